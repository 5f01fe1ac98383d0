"""Typed configuration of distillation; presets are `configs/distill/*.yaml`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from streamdit.config import StrictModel
from training.config import RunConfig

Points = tuple[tuple[float, float], ...]
"""A share over the course of a run: `(progress, share)` points, both 0...1, linear between."""


class DriftConfig(StrictModel):
    """Buffers from a model's own stream in place of noised clips.

    A stream feeds on what it made itself, which training on noised clips never shows it. A buffer
    of this kind starts as a noised clip and is moved by some chunks, by the teacher or by the
    student as it is then; with as many chunks as the buffer has, nothing of the clip is left.
    """

    teacher: Points = ((0.0, 0.0),)
    """Share of staircase buffers that the teacher's stream gives, over the course of the run."""
    student: Points = ((0.0, 0.0),)
    """Share of staircase buffers that the student's own stream gives, likewise."""
    chunks: int = Field(default=4, gt=0)
    """Most chunks that a stream moves before its buffer is taken; 1 to this many are drawn."""

    @field_validator("teacher", "student")
    @classmethod
    def _check_points(cls, points: Points) -> Points:
        if not points or any(not 0.0 <= value <= 1.0 for point in points for value in point):
            raise ValueError("give points [progress, share], each between 0 and 1")
        if any(a[0] >= b[0] for a, b in pairwise(points)):
            raise ValueError("the points' progress must ascend; sort them")
        return points

    @model_validator(mode="after")
    def _check_sum(self) -> DriftConfig:
        for progress, _ in (*self.teacher, *self.student):
            both = share_at(self.teacher, progress) + share_at(self.student, progress)
            if both > 1.0 + 1e-9:
                raise ValueError(
                    f"teacher and student together give {both:g} of the buffers at progress "
                    f"{progress:g}; lower one of them to at most 1 in sum"
                )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's stream is ever asked."""
        return any(share > 0 for _, share in self.teacher)

    @property
    def needs_student(self) -> bool:
        """Whether the student's own stream is ever asked."""
        return any(share > 0 for _, share in self.student)


def share_at(points: Points, progress: float) -> float:
    """Value of a piecewise linear share at `progress`; constant before and behind its points."""
    for (left, low), (right, high) in pairwise(points):
        if left <= progress < right:
            return low + (high - low) * (progress - left) / (right - left)
    return points[0][1] if progress < points[0][0] else points[-1][1]


class TeacherConfig(StrictModel):
    """How the teacher is rolled out to make targets."""

    chunk_frames: int = Field(gt=0)
    """Latent frames per chunk of teacher and student, c."""
    reference_frames: int = Field(default=0, ge=0)
    """Clean reference frames at the head, K."""
    micro_steps: int = Field(gt=0)
    """Teacher steps per chunk, s; the student takes one."""
    guidance_scale: float | tuple[float, ...] = 3.0
    """Guidance weight w that the student learns to do without: one for all, or one for each noise
    segment i = 1 (noisiest) ... N."""
    uniform_share: float = Field(default=0.2, ge=0, le=1)
    """Share of buffers whose frames all stand at the same level, so that the student can make its
    own first video by text-to-video."""
    ramp_share: float = Field(default=0.0, ge=0, le=1)
    """Share of buffers on the way up a ramp, so that the student can start a stream by one."""
    continued_share: float = Field(default=0.0, ge=0, le=1, exclude_if=lambda share: share == 0)
    """Share of buffers whose frames all stand at the same level behind clean references, so that
    the student can continue a given video; needs `reference_frames`."""
    placement: Literal["replicated", "sharded"] = "replicated"
    """A whole teacher on every worker, or its weights sharded over the workers (ZeRO-3)."""

    @field_validator("guidance_scale")
    @classmethod
    def _check_guidance(cls, scale: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if min(scale if isinstance(scale, tuple) else (scale,)) < 0:
            raise ValueError("guidance weights are not negative; 1 is no guidance")
        return scale

    @model_validator(mode="after")
    def _check_cold_start(self) -> TeacherConfig:
        if self.uniform_share + self.ramp_share + self.continued_share > 1.0:
            raise ValueError(
                "uniform_share, ramp_share and continued_share together exceed 1; lower one of them"
            )
        if self.uniform_share == 0 and self.ramp_share == 0:
            raise ValueError(
                "uniform_share is 0, so the student could not make the first video of a stream; "
                "set uniform_share (about 0.2), or ramp_share to start streams by a ramp"
            )
        if self.uniform_share == 0 and self.reference_frames:
            raise ValueError(
                "with reference_frames the first video is made by text-to-video, which "
                "uniform_share: 0 leaves out; set uniform_share (about 0.2)"
            )
        if self.continued_share and not self.reference_frames:
            raise ValueError(
                "continued_share teaches how to go on behind clean reference frames, but "
                "reference_frames is 0; set reference_frames, or continued_share: 0"
            )
        if self.ramp_share and self.reference_frames:
            raise ValueError(
                "ramp_share teaches a start that makes no references, so with reference_frames it "
                "is of no use; set ramp_share: 0"
            )
        return self


class DistillConfig(RunConfig):
    """One run of multistep distillation."""

    free_parts: ClassVar[dict[str, Any]] = {"teacher": {"placement": "replicated"}}

    teacher: TeacherConfig
    """Rollout of the teacher."""
    segment_weights: tuple[float, ...] | None = None
    """Weight of the loss for each noise segment i = 1 (noisiest) ... N; default: all alike."""
    drift: DriftConfig = DriftConfig()
    """Buffers from the teacher's and the student's own stream."""
    rollouts: str | None = None
    """Teacher rollouts from `streamdit rollouts`, a folder or S3; default: the teacher is asked at
    every step, and is in memory beside the student."""

    @field_validator("segment_weights")
    @classmethod
    def _check_weights(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and (min(weights, default=0) < 0 or sum(weights) == 0):
            raise ValueError("weights of segments are not negative, and not all of them 0")
        return weights

    @model_validator(mode="after")
    def _check_cached(self) -> DistillConfig:
        if self.rollouts and (self.drift.needs_teacher or self.drift.needs_student):
            raise ValueError(
                "rollouts are made before the run, from noised clips, so drift cannot be had with "
                "them; remove rollouts or drift"
            )
        return self
