"""What distillation keeps, measured where the right answer is known: the sprite world.

Figures of several systems on the same prompts and noise, each with a 95 % interval over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from evaluation.sprite_score import read_sprite, score
from evaluation.sprites import SpritePrompt

AXES = ("colour", "shape", "background", "direction")

# Two-sided 97.5 % points of Student's t, by degrees of freedom; beyond them the normal one.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z_975 = 1.96


class Interval(BaseModel):
    """A mean over seeds, and half the width of its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    """Mean over the seeds."""
    half: float | None
    """Half width (Student's t); None with a single seed."""

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if self.half is None else f"{self.mean:.3g} ± {self.half:.2g}"

    def percent(self) -> str:
        """As percentage points."""
        value = f"{100 * self.mean:.1f}"
        return value if self.half is None else f"{value} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of one value per seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean=mean, half=None)
    freedom = len(values) - 1
    t = T_975[freedom - 1] if freedom <= len(T_975) else Z_975
    return Interval(mean=mean, half=t * statistics.stdev(values) / math.sqrt(len(values)))


class SystemFigures(BaseModel):
    """Figures of one system, a value per seed each."""

    model_config = ConfigDict(frozen=True)

    label: str
    """What it is, in words."""
    accuracy: dict[str, list[float]]
    """Share of videos right, by axis."""
    flicker: list[float]
    """Mean change of the background from frame to frame, 8-bit levels; 0 in the true world."""
    agreement: list[float]
    """Share of videos in which the full teacher, from the same noise, shows the same four
    attributes."""
    drift: dict[int, list[float]]
    """Mean accuracy over the axes, by buffer lengths after the start of the stream."""
    evaluations_per_second: float
    """Evaluations of the network per second of video, counted at the network."""
    wall_per_second: list[float]
    """Wall time per second of video, streams in step counted each for itself."""


def accuracies(videos: np.ndarray, prompts: Sequence[SpritePrompt], fps: float) -> dict[str, float]:
    """Share of videos `[i, n, H, W, 3]` that have each axis of their prompt right."""
    scores = [score(video, prompt, fps) for video, prompt in zip(videos, prompts, strict=True)]
    return {axis: statistics.fmean(getattr(one, axis) for one in scores) for axis in AXES}


def agreement(videos: np.ndarray, others: np.ndarray, fps: float) -> float:
    """Share of pairs of videos that show the same on every axis, right or wrong."""
    same = []
    for video, other in zip(videos, others, strict=True):
        one, two = read_sprite(video, fps), read_sprite(other, fps)
        same.append(all(getattr(one, axis) == getattr(two, axis) for axis in AXES))
    return statistics.fmean(same)


def background_flicker(videos: np.ndarray) -> float:
    """Mean absolute change of the picture's median colour between frames, 8-bit levels.

    The background covers most of the picture and is constant in the world, so any change of its
    colour is flicker, whatever moves in front of it.
    """
    background = np.median(videos.astype(np.float32), axis=(2, 3))  # [i, n, 3]
    return float(np.abs(np.diff(background, axis=1)).mean())


def difference(system: SystemFigures, other: SystemFigures, axis: str) -> Interval:
    """How much more `system` gets right on an axis than `other`, paired by seed."""
    pairs = zip(system.accuracy[axis], other.accuracy[axis], strict=True)
    return interval([mine - theirs for mine, theirs in pairs])


def markdown(systems: Sequence[SystemFigures], about: str) -> str:
    """The tables; the first system is the full teacher, the last the student.

    Args:
        systems: full teacher, undistilled teacher at few steps, student.
        about: what was measured on what, in a sentence.
    """
    teacher, undistilled, student = systems
    rows = [
        ("evaluations per second of video", [f"{s.evaluations_per_second:.0f}" for s in systems]),
        ("wall time per second of video, s", [str(interval(s.wall_per_second)) for s in systems]),
        *(
            (f"{axis} right, %", [interval(s.accuracy[axis]).percent() for s in systems])
            for axis in AXES
        ),
        ("background flicker, 8-bit levels", [str(interval(s.flicker)) for s in systems]),
        ("same as the full teacher, %", [interval(s.agreement).percent() for s in systems]),
        *(
            (
                f"all axes after {buffers} buffer{'s' if buffers > 1 else ''}, %",
                [interval(s.drift[buffers]).percent() for s in systems],
            )
            for buffers in teacher.drift
        ),
    ]
    table = _table(["", *(system.label for system in systems)], rows)
    gains = [
        (
            axis,
            [
                difference(student, undistilled, axis).percent(),
                difference(student, teacher, axis).percent(),
            ],
        )
        for axis in AXES
    ]
    compared = _table(
        ["points, paired by seed", "student − undistilled", "student − full teacher"], gains
    )
    return f"{about}\n\n{table}\n\n{compared}\n"


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def plot(systems: Sequence[SystemFigures], path: Path) -> Path:
    """Accuracy per axis, and over the length of the stream, as one SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = ("#4c78a8", "#b0b0b0", "#e45756")
    for index, (system, colour) in enumerate(zip(systems, colours, strict=True)):
        values = [interval(system.accuracy[axis]) for axis in AXES]
        places = np.arange(len(AXES)) + 0.27 * (index - 1)
        _errorbars(bars, places, values, colour, bar=True, label=system.label)
        drift = {buffers: interval(found) for buffers, found in system.drift.items()}
        _errorbars(lines, np.array(list(drift)), list(drift.values()), colour, bar=False)
    bars.set_xticks(range(len(AXES)), AXES)
    bars.set_ylabel("right, %")
    bars.set_title("on prompts never trained on", fontsize=10)
    lines.set_xscale("log", base=2)
    lines.set_xticks(list(systems[0].drift), [str(buffers) for buffers in systems[0].drift])
    lines.set_xlabel("buffer lengths after the start")
    lines.set_title("all axes, as the stream goes on", fontsize=10)
    for axes in (bars, lines):
        axes.set_ylim(0, 105)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _errorbars(
    axes: object,
    places: np.ndarray,
    values: Sequence[Interval],
    colour: str,
    bar: bool,
    label: str | None = None,
) -> None:
    means = [100 * value.mean for value in values]
    halves = [100 * (value.half or 0.0) for value in values]
    if bar:
        axes.bar(places, means, 0.25, yerr=halves, color=colour, capsize=2, label=label)  # type: ignore[attr-defined]
    else:
        axes.errorbar(places, means, yerr=halves, color=colour, marker="o", capsize=2)  # type: ignore[attr-defined]


def merge_seeds(by_seed: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """A dictionary of values per seed from one dictionary for each seed."""
    return {name: [values[name] for values in by_seed] for name in by_seed[0]}
