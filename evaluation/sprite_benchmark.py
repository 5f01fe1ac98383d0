"""What distillation keeps, measured where the right answer is known: the sprite world.

Figures of a system on given prompts, a mark for every video of every seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

from evaluation.intervals import Marks
from evaluation.sprite_score import read_sprite, score
from evaluation.sprites import SpritePrompt

AXES = ("colour", "shape", "background", "direction")

Value = TypeVar("Value")


class SystemFigures(BaseModel):
    """Figures of one system; the outer lists are over seeds, the inner ones over videos."""

    model_config = ConfigDict(frozen=True)

    label: str
    """What it is, in words."""
    right: dict[str, list[list[bool]]]
    """Whether each video is right, by axis."""
    same: list[list[bool]]
    """Whether the full teacher, from the same noise, shows the same four attributes."""
    drift: dict[int, list[list[float]]]
    """Share of the axes that each long video has right, by buffer lengths after its start."""
    flicker: list[float]
    """Mean change of the background from frame to frame, 8-bit levels; 0 in the true world."""
    evaluations_per_second: float
    """Evaluations of the network per second of video, counted at the network."""
    wall_per_second: list[float]
    """Wall time per second of video of one stream, one value per round of timing."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy(self) -> dict[str, list[float]]:
        """Share of videos right, by axis, one value per seed."""
        return {axis: per_seed(marks) for axis, marks in self.right.items()}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def agreement(self) -> list[float]:
        """Share of videos that show what the full teacher shows, one value per seed."""
        return per_seed(self.same)


def per_seed(marks: Marks) -> list[float]:
    """Mean mark of each seed."""
    return [statistics.fmean(seed) for seed in marks]


def marks_by_axis(
    videos: np.ndarray, prompts: Sequence[SpritePrompt], fps: float
) -> dict[str, list[bool]]:
    """Whether each video `[i, n, H, W, 3]` has each axis of its prompt right."""
    scores = [score(video, prompt, fps) for video, prompt in zip(videos, prompts, strict=True)]
    return {axis: [bool(getattr(one, axis)) for one in scores] for axis in AXES}


def mean_marks(by_axis: Mapping[str, Sequence[bool]]) -> list[float]:
    """Share of the axes that each video has right."""
    return [statistics.fmean(marks) for marks in zip(*by_axis.values(), strict=True)]


def agreement_marks(videos: np.ndarray, others: np.ndarray, fps: float) -> list[bool]:
    """Whether each pair of videos shows the same on every axis, right or wrong."""
    same = []
    for video, other in zip(videos, others, strict=True):
        one, two = read_sprite(video, fps), read_sprite(other, fps)
        same.append(all(getattr(one, axis) == getattr(two, axis) for axis in AXES))
    return same


def background_flicker(videos: np.ndarray) -> float:
    """Mean absolute change of the picture's median colour between frames, 8-bit levels.

    The background covers most of the picture and is constant in the world, so any change of its
    colour is flicker, whatever moves in front of it.
    """
    background = np.median(videos.astype(np.float32), axis=(2, 3))  # [i, n, 3]
    return float(np.abs(np.diff(background, axis=1)).mean())


def merge_seeds(by_seed: Sequence[Mapping[str, Value]]) -> dict[str, list[Value]]:
    """A dictionary of values per seed from one dictionary for each seed."""
    return {name: [values[name] for values in by_seed] for name in by_seed[0]}
