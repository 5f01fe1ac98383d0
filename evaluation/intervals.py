"""95 % intervals: of one value per seed, of shares of videos, and of differences of such shares.

A few seeds that agree say nothing about how sure a share is: three times 64 of 64 is not 100 ± 0.
So the half width of a share over seeds is never below that of all its videos taken together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

# Two-sided 97.5 % points of Student's t, by degrees of freedom, and the normal one.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z_975 = 1.96

Marks = Sequence[Sequence[float]]
"""For each seed a mark, 0...1, of each of its videos; the same videos in every seed's order.

A mark is a yes or a no, or a mean of several."""


class Interval(BaseModel):
    """A mean over seeds, and half the width of its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    """Mean over the seeds."""
    half: float | None
    """Half width; None with a single seed."""

    @property
    def low(self) -> float:
        """Lower end; the mean with a single seed."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end; the mean with a single seed."""
        return self.mean + (self.half or 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if self.half is None else f"{self.mean:.3g} ± {self.half:.2g}"

    def percent(self) -> str:
        """As percentage points."""
        value = f"{100 * self.mean:.1f}"
        return value if self.half is None else f"{value} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval (Student's t) of one value per seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean=mean, half=None)
    freedom = len(values) - 1
    half = student_t(freedom) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, half=half)


def student_t(freedom: int) -> float:
    """Two-sided 97.5 % point of Student's t, to a thousandth.

    From a table, and beyond it by the Cornish-Fisher expansion about the normal point.
    """
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_975
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def share_interval(marks: Marks) -> Interval:
    """Interval over seeds of a share of yes, at least as wide as Wilson's of all videos."""
    over_seeds = interval([statistics.fmean(seed) for seed in marks])
    return _at_least(over_seeds, wilson_half(over_seeds.mean, sum(map(len, marks))))


def mean_interval(marks: Marks) -> Interval:
    """Interval over seeds of marks that are means of several, at least as wide as by their scatter.

    That is of all videos together, with one of mark 0 and one of mark 1 added.
    """
    over_seeds = interval([statistics.fmean(seed) for seed in marks])
    together = [mark for seed in marks for mark in seed]
    return _at_least(over_seeds, _half_by_scatter([*together, 0.0, 1.0]))


def wilson_half(share: float, count: int) -> float:
    """From a share of `count` to the further end of Wilson's score interval."""
    weight = Z_975**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = Z_975 * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return max(share - (centre - half), (centre + half) - share)


def difference_interval(marks: Marks, others: Marks) -> Interval:
    """Interval of how much a share is above another of the same seeds and videos.

    Seeds are paired for Student's t. The floor is that of all pairs of videos together, with half
    a pair added to each way of agreeing and of differing (Agresti and Min, 2005): pairs that never
    differ leave a doubt too.
    """
    means = [
        statistics.fmean(mine) - statistics.fmean(theirs)
        for mine, theirs in zip(marks, others, strict=True)
    ]
    pairs = [
        mine - theirs
        for seed, other in zip(marks, others, strict=True)
        for mine, theirs in zip(seed, other, strict=True)
    ]
    half_a_pair = math.sqrt(0.5)
    return _at_least(interval(means), _half_by_scatter([*pairs, half_a_pair, -half_a_pair]))


def _half_by_scatter(values: Sequence[float]) -> float:
    """Half width of the mean's interval, from how much the values scatter."""
    return Z_975 * statistics.pstdev(values) / math.sqrt(len(values))


def _at_least(found: Interval, floor: float) -> Interval:
    if found.half is None:
        return found
    return Interval(mean=found.mean, half=max(found.half, floor))
