"""Figures of the stream buffer, drawn from the code that moves it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from streamdit.config import GammaConfig
from streamdit.partition import PartitionScheme, apply_gamma

COLOURS = "YlGnBu"
"""Clean frames are dark, noise is pale."""
INK = "#37474f"


def stream() -> Figure:
    """Every denoising step of a short stream: which latent frames are in the buffer, how clean."""
    scheme = PartitionScheme(K=0, N=4, c=2, s=2)
    figure, axes = _figure(7.2, 3.9)
    steps = list(moving_buffer(scheme, moves=5))
    for row, (first, levels) in enumerate(steps):
        for column, tau in enumerate(levels):
            _cell(axes, first + column, row, tau, label=f"{tau:.3g}")
    for move in range(1, 5):
        row, frame = move * scheme.s, (move - 1) * scheme.c
        axes.annotate(
            "decoded",
            xy=(frame + 1, row - 0.06),
            xytext=(frame + 1, row + 0.75),
            ha="center",
            color=INK,
            fontsize=7,
            arrowprops={"arrowstyle": "<-", "color": INK, "lw": 0.8},
        )
    last = steps[-1][0] + scheme.buffer_frames
    axes.set(xlim=(0, last), ylim=(len(steps), 0))
    axes.set_xticks(np.arange(last) + 0.5, range(last))
    axes.set_yticks(np.arange(len(steps)) + 0.5, range(len(steps)))
    axes.set_xlabel("latent frame of the video")
    axes.set_ylabel("denoising step")
    title = f"N = {scheme.N} chunks of c = {scheme.c} frames, s = {scheme.s} steps before each move"
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    return figure


def moving_buffer(scheme: PartitionScheme, moves: int) -> Iterator[tuple[int, list[float]]]:
    """First latent frame in the buffer and tau of each frame, before every step."""
    for move in range(moves):
        for micro_step in range(scheme.s):
            yield move * scheme.c, scheme.levels(micro_step).tolist()


def partitions() -> Figure:
    """The mix of partitions that the paper trains with, on one buffer of 16 frames."""
    schemes = [PartitionScheme.for_buffer(16, c) for c in (1, 2, 4, 8, 16)]
    schemes.append(PartitionScheme.for_buffer(16, 4, reference_frames=4))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, scheme in zip(grid.flat, schemes, strict=True):
        low, high = scheme.levels(0), scheme.levels(scheme.s)
        for frame, (start, end) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            _range(axes, frame, start, end)
        axes.set_title(_title(scheme), loc="left", fontsize=9, color=INK)
        axes.set(xlim=(0, 16), ylim=(0, 1.02))
        axes.set_xticks([0, 8, 16])
        _plain(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("τ: 0 noise … 1 clean")
    for axes in grid[1]:
        axes.set_xlabel("frame of the buffer")
    return figure


def schedule() -> Figure:
    """Noise schedules: where the segments of N = 4 chunks end."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    grid = figure.subplots(1, 3, sharey=True)
    kinds = [
        ("linear", GammaConfig()),
        ("exponential, k = 3", GammaConfig(kind="exponential", power=3.0)),
        ("shifted, 3", GammaConfig(kind="shifted", shift=3.0)),
    ]
    t = torch.linspace(0, 1, 201)
    for axes, (name, gamma) in zip(grid, kinds, strict=True):
        for i in range(1, 5):
            ends = apply_gamma(torch.tensor([i - 1, i]) / 4, gamma).tolist()
            axes.axhspan(*ends, color=_colour(sum(ends) / 2), lw=0)
        axes.plot(t, apply_gamma(t, gamma), color=INK, lw=1.5)
        axes.set_title(name, loc="left", fontsize=9, color=INK)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of the steps taken")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
        _plain(axes)
    grid[0].set_ylabel("τ = γ(t)")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "images/stream.svg": stream,
    "images/partitions.svg": partitions,
    "images/schedule.svg": schedule,
}


def draw(name: str) -> bytes:
    """The figure as SVG, the same bytes each time."""
    # Text stays text, which a reader can select and search engines can read.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        buffer = io.BytesIO()
        FIGURES[name]().savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)


def _colour(tau: float) -> Sequence[float]:
    return matplotlib.colormaps[COLOURS](0.08 + 0.8 * tau)


def _cell(axes: Axes, column: int, row: int, tau: float, label: str) -> None:
    axes.add_patch(matplotlib.patches.Rectangle((column, row), 1, 1, fc=_colour(tau), ec="white"))
    ink = "white" if tau > 0.5 else INK
    axes.text(column + 0.5, row + 0.52, label, ha="center", va="center", fontsize=6.5, color=ink)


def _range(axes: Axes, frame: int, start: float, end: float) -> None:
    if end == start:  # a reference frame stays clean
        start = end - 0.02
    axes.add_patch(
        matplotlib.patches.Rectangle(
            (frame, start), 1, end - start, fc=_colour((start + end) / 2), ec="white", lw=0.6
        )
    )


def _title(scheme: PartitionScheme) -> str:
    note = {(0, 1): ": text-to-video", (0, 16): ": diagonal"}.get((scheme.K, scheme.N), "")
    return f"K={scheme.K} N={scheme.N} c={scheme.c}{note}"
