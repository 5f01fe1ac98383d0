"""Line charts as SVG that takes its colours from the page it stands in.

matplotlib draws with placeholder colours, which are then replaced by CSS variables; so one chart
fits a light and a dark page.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACEHOLDERS = {
    "#010203": "var(--ink)",
    "#040506": "var(--faint)",
    "#070809": "var(--rule)",
    "#0a0b0c": "var(--series-1)",
    "#0d0e0f": "var(--series-2)",
    "#101112": "var(--series-3)",
    "#131415": "var(--series-4)",
}
INK, FAINT, RULE, *SERIES = PLACEHOLDERS
# Beyond this ratio of largest to smallest smoothed value a linear axis hides the end of the curve.
LOG_RATIO = 30.0


class Series(BaseModel):
    """A named curve; values that are not finite leave a gap."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Legend entry."""
    steps: list[float]
    """Horizontal positions, ascending."""
    values: list[float]
    """One value per step."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Series:
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"series {self.name!r} has {len(self.steps)} steps and {len(self.values)} values; "
                "give one value per step"
            )
        return self


class Chart(BaseModel):
    """Curves that share their axes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    """What is shown."""
    series: list[Series] = Field(min_length=1, max_length=4)
    """Up to four curves."""
    x_label: str = "step"
    """Horizontal axis."""
    y_label: str = "loss"
    """Vertical axis."""


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values (odd), of fewer near the ends.

    Values that are not finite are left out, and leave NaN where nothing else is near.
    """
    kernel = np.ones(window)
    finite = np.isfinite(values)
    totals = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")
    counts = np.convolve(finite.astype(float), kernel, mode="full")
    middle = slice(window // 2, window // 2 + len(values))
    means = np.full(len(values), np.nan)
    return np.divide(totals[middle], counts[middle], out=means, where=counts[middle] > 0.5)


def smoothing_window(points: int) -> int:
    """Odd number of values averaged for the bold line: about a twentieth of the curve."""
    return 2 * (points // 40) + 1


def line_chart(chart: Chart) -> str:
    """Draw a chart: raw values thin, their running mean bold.

    The vertical axis starts at zero, or is logarithmic and says so where the values span more
    than a factor of `LOG_RATIO`.

    Returns:
        An `<svg>` element.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    smoothed = []
    for series, colour in zip(chart.series, SERIES, strict=False):
        steps, values = np.array(series.steps, float), np.array(series.values, float)
        window = smoothing_window(len(values))
        bold = smooth(values, window)
        smoothed.append(bold)
        if window > 1:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, bold, color=colour, linewidth=1.9, label=series.name)
    _style(axes, chart, np.concatenate([*smoothed, np.empty(0)]))
    return _svg(figure, chart.title)


def _style(axes: Axes, chart: Chart, values: np.ndarray) -> None:
    """Axes of a chart whose smoothed values are `values`."""
    finite = values[np.isfinite(values)]
    logarithmic = len(finite) > 0 and finite.min() > 0 and finite.max() > LOG_RATIO * finite.min()
    if logarithmic:
        axes.set_yscale("log")
    elif len(finite) == 0 or finite.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(chart.x_label, color=FAINT)
    axes.set_ylabel(f"{chart.y_label} (log scale)" if logarithmic else chart.y_label, color=FAINT)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(which="both", colors=FAINT, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(RULE)
    if len(chart.series) > 1:
        axes.legend(frameon=False, labelcolor=INK, loc="upper right")


def _svg(figure: Figure, title: str) -> str:
    """Inline SVG of a figure, scalable, with the page's colours and font."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for placeholder, variable in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    return svg
