"""Typed configuration of distillation; presets are `configs/distill/*.yaml`."""

from __future__ import annotations

from pydantic import Field

from streamdit.config import StrictModel
from training.config import RunConfig


class TeacherConfig(StrictModel):
    """How the teacher is rolled out to make targets."""

    chunk_frames: int = Field(gt=0)
    """Latent frames per chunk of teacher and student, c."""
    reference_frames: int = Field(default=0, ge=0)
    """Clean reference frames at the head, K."""
    micro_steps: int = Field(gt=0)
    """Teacher steps per chunk, s; the student takes one."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """Guidance weight w that the student learns to do without."""
    uniform_share: float = Field(default=0.2, ge=0, le=1)
    """Share of buffers whose frames all stand at the same level, so that the student can make its
    own first video."""


class DistillConfig(RunConfig):
    """One run of multistep distillation."""

    teacher: TeacherConfig
    """Rollout of the teacher."""
