"""The sprite benchmark's report: tables with intervals, a verdict on each axis, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from evaluation.intervals import (
    Interval,
    difference_interval,
    interval,
    mean_interval,
    share_interval,
)
from evaluation.sprite_benchmark import AXES, SystemFigures, per_seed

FAILS_BY = 0.10
"""An axis fails undistilled where the full teacher is ahead of the undistilled one by this."""
GAIN = 0.10
"""How far the student shall then be above the undistilled teacher."""
SHORT = 0.03
"""How far the student may be below the full teacher, on any axis."""

COLOURS = ("#3b6ea8", "#858585", "#d1495b")
MARKERS = ("o", "s", "D")

Judgement = Literal["met", "not met", "not shown"]


class Verdict(BaseModel):
    """How the student stands on one axis, in shares; a judgement is None where none is due."""

    model_config = ConfigDict(frozen=True)

    axis: str
    """What is judged."""
    lost: Interval
    """Full teacher minus undistilled teacher: what few steps without guidance lose."""
    gained: Interval
    """Student minus undistilled teacher."""
    beside: Interval
    """Student minus full teacher."""
    fails: bool
    """Whether the axis fails undistilled."""
    gain: Judgement | None
    """Whether the student is far enough above the undistilled teacher; due where the axis fails."""
    keeps: Judgement | None
    """Whether the student is close enough to the full teacher."""


def judge(found: Interval, least: float) -> Judgement | None:
    """Whether a difference is at least `least`: decided by the end of its interval."""
    if found.half is None:
        return None
    if found.low >= least - 1e-9:
        return "met"
    return "not met" if found.high < least - 1e-9 else "not shown"


def verdicts(systems: Sequence[SystemFigures]) -> list[Verdict]:
    """The verdict on every axis.

    Args:
        systems: full teacher, undistilled teacher at few steps, student.
    """
    teacher, undistilled, student = systems
    found = []
    for axis in AXES:
        lost = difference_interval(teacher.right[axis], undistilled.right[axis])
        gained = difference_interval(student.right[axis], undistilled.right[axis])
        beside = difference_interval(student.right[axis], teacher.right[axis])
        fails = lost.mean >= FAILS_BY - 1e-9
        found.append(
            Verdict(
                axis=axis,
                lost=lost,
                gained=gained,
                beside=beside,
                fails=fails,
                gain=judge(gained, GAIN) if fails else None,
                keeps=judge(beside, -SHORT),
            )
        )
    return found


def markdown(systems: Sequence[SystemFigures], about: Sequence[str]) -> str:
    """The report's text.

    Args:
        systems: full teacher, undistilled teacher at few steps, student.
        about: paragraphs that say what was measured, and on what.
    """
    parts = [*about, _figures(systems), "## Verdict", *_judged(verdicts(systems))]
    if len(systems[0].flicker) > 1:
        parts += ["## Values of each seed", _values(systems)]
    return "\n\n".join(parts) + "\n"


def _figures(systems: Sequence[SystemFigures]) -> str:
    shares = [(f"{axis} right, %", [s.right[axis] for s in systems]) for axis in AXES]
    means = [(_after(buffers), [s.drift[buffers] for s in systems]) for buffers in systems[0].drift]
    # The full teacher is the same as itself, which no number of videos makes surer.
    same = ["–", *(share_interval(s.same).percent() for s in systems[1:])]
    first, last = min(systems[0].drift), max(systems[0].drift)
    changes = [difference_interval(s.drift[last], s.drift[first]) for s in systems]
    rows = [
        ("evaluations per second of video", [f"{s.evaluations_per_second:.0f}" for s in systems]),
        ("wall time per second of video, s", [str(interval(s.wall_per_second)) for s in systems]),
        *((name, [share_interval(one).percent() for one in marks]) for name, marks in shares),
        *((name, [mean_interval(one).percent() for one in marks]) for name, marks in means),
        *(
            [(f"change from {first} to {last} buffers, points", [one.percent() for one in changes])]
            if last > first
            else []
        ),
        ("same as the full teacher, %", same),
        ("background flicker, 8-bit levels", [str(interval(s.flicker)) for s in systems]),
    ]
    return _table(["", *(system.label for system in systems)], rows)


def _values(systems: Sequence[SystemFigures]) -> str:
    shares = [
        *((f"{axis} right, %", [s.accuracy[axis] for s in systems]) for axis in AXES),
        ("same as the full teacher, %", [s.agreement for s in systems]),
        *(
            (_after(buffers), [per_seed(s.drift[buffers]) for s in systems])
            for buffers in systems[0].drift
        ),
    ]
    rows = [
        *((name, [_listed(one, "{:.1f}", 100.0) for one in values]) for name, values in shares),
        ("background flicker, 8-bit levels", [_listed(s.flicker, "{:.3g}") for s in systems]),
        (
            "wall time per second of video, s, by round",
            [_listed(s.wall_per_second, "{:.3g}") for s in systems],
        ),
    ]
    return _table(["", *(system.label for system in systems)], rows)


def _after(buffers: int) -> str:
    return f"mean over the axes after {buffers} buffer{'s' if buffers > 1 else ''}, %"


def _listed(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    return ", ".join(form.format(scale * value) for value in values)


def _judged(found: Sequence[Verdict]) -> list[str]:
    """Table of the verdicts, and what they mean."""
    judged = found[0].keeps is not None
    header = ["points", "full − undistilled", "student − undistilled", "student − full teacher"]
    if judged:
        header += ["fails undistilled", "10 above undistilled", "within 3 of the full teacher"]
    rows = [
        (
            one.axis,
            [
                *(each.percent() for each in (one.lost, one.gained, one.beside)),
                *(
                    ["yes" if one.fails else "no", one.gain or "–", str(one.keeps)]
                    if judged
                    else []
                ),
            ],
        )
        for one in found
    ]
    rules = [
        "Differences are paired by seed and video. An axis fails undistilled where the full "
        f"teacher is at least {100 * FAILS_BY:.0f} points above the undistilled one; there the "
        f"student should be at least {100 * GAIN:.0f} points above the undistilled teacher. "
        f"Everywhere it should be at most {100 * SHORT:.0f} points below the full teacher."
    ]
    if judged:
        rules[0] += (
            " A goal is met, or not met, where the whole interval says so; else it is not shown."
        )
    else:
        rules.append("One seed does not tell how sure these differences are: no goal is judged.")
    if not any(one.fails for one in found):
        rules.append(
            f"No axis fails undistilled, so a gain of {100 * GAIN:.0f} points is not available "
            "here: few steps without guidance lose too little."
        )
    return [_table(header, rows), *rules]


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def plot(systems: Sequence[SystemFigures], path: Path) -> Path:
    """Accuracy per axis, and over the length of the stream, as one SVG with its text as text."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look = {"svg.fonttype": "none", "svg.hashsalt": "sprites", "font.size": 11}
    with mpl.rc_context(look):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
        _bars(bars, systems)
        _lines(lines, systems)
        for axes in (bars, lines):
            axes.set_ylim(0, 104)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e5e5e5")
            axes.set_axisbelow(True)
        handles, labels = bars.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _bars(axes: Any, systems: Sequence[SystemFigures]) -> None:
    for index, (system, colour) in enumerate(zip(systems, COLOURS, strict=True)):
        found = [share_interval(system.right[axis]) for axis in AXES]
        places = np.arange(len(AXES)) + 0.28 * (index - 1)
        heights = [100 * one.mean for one in found]
        axes.bar(places, heights, 0.26, color=colour, label=system.label)
        axes.errorbar(places, heights, yerr=_reach(found), fmt="none", ecolor="black", capsize=3)
        for place, height in zip(places, heights, strict=True):
            axes.text(place, 2, f"{height:.0f}", ha="center", color="white", fontsize=10)
    axes.set_xticks(range(len(AXES)), AXES)
    axes.set_ylabel("right, %")
    axes.set_title("prompts that training never showed", fontsize=11)


def _lines(axes: Any, systems: Sequence[SystemFigures]) -> None:
    buffers = list(systems[0].drift)
    for index, (system, colour, marker) in enumerate(zip(systems, COLOURS, MARKERS, strict=True)):
        found = [mean_interval(system.drift[length]) for length in buffers]
        # Side by side, so that neither points nor error bars hide each other.
        places = np.arange(len(buffers)) + 0.1 * (index - 1)
        heights = [100 * one.mean for one in found]
        axes.errorbar(
            places,
            heights,
            yerr=_reach(found),
            color=colour,
            marker=marker,
            markersize=5,
            capsize=3,
        )
    axes.set_xticks(range(len(buffers)), [str(length) for length in buffers])
    axes.set_xlim(-0.4, len(buffers) - 0.6)
    axes.set_xlabel("buffer lengths after the start")
    axes.set_title("mean over the axes, as the stream goes on", fontsize=11)


def _reach(found: Sequence[Interval]) -> np.ndarray:
    """Error bars `[2, n]` in percent, ending where shares end."""
    down = [100 * (one.mean - max(one.low, 0.0)) for one in found]
    up = [100 * (min(one.high, 1.0) - one.mean) for one in found]
    return np.array([down, up])
