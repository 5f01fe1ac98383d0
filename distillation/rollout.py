"""Teacher rollouts: a buffer, and the average velocity of the teacher's guided walk from it.

This is the one place where targets are made; live distillation and `streamdit rollouts` share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distillation.drift import moved_samples, stream_buffers
from distillation.plan import FROM_STUDENT, FROM_TEACHER, RolloutPlan
from streamdit.flow import (
    VelocityFunction,
    euler_step,
    guided_velocity,
    interpolate,
    per_frame,
)
from streamdit.text.base import TextStates
from training.data import Batch
from training.objective import Draw, Draws


@dataclass(frozen=True)
class Rollout:
    """Buffers and what the student shall answer to them.

    Attributes:
        start: X0, `[b, f, C, h, w]` float32.
        target: average velocity over each frame's segment, same shape; 0 for resting frames.
        positions: `[b, f]`, steps of T that each frame has taken at the start.
        moving: `[b, f]` bool; references and waiting frames rest.
        kind: `[b]`, index into :data:`distillation.plan.KINDS`.
    """

    start: Tensor
    target: Tensor
    positions: Tensor
    moving: Tensor
    kind: Tensor


class RolloutSource(Protocol):
    """Where rollouts come from: a teacher in memory, or files."""

    @property
    def draw(self) -> Draw:
        """Makes everything random of one sample."""
        ...

    def __call__(self, student: VelocityFunction, batch: Batch, draws: Draws) -> Rollout:
        """Rollouts of a batch."""
        ...

    def extra_forwards(self, draws: Draws) -> int:
        """Evaluations, one sample each, that the rollouts of a batch of these draws cost now."""
        ...


@torch.no_grad()
def teacher_walk(
    teacher: VelocityFunction,
    start: Tensor,
    positions: Tensor,
    moving: Tensor,
    plan: RolloutPlan,
    text: TextStates,
    null_text: TextStates,
) -> Tensor:
    """Carry all frames together from the start to the end of their segments, in s guided steps.

    Args:
        teacher: velocity function.
        start: `[b, f, C, h, w]`.
        positions: `[b, f]` where each frame begins.
        moving: `[b, f]` bool.
        plan: steps, noise schedule and guidance.
        text: states of b prompts.
        null_text: states of the empty prompt, batch 1.

    Returns:
        The way that each frame went, end less start, `[b, f, C, h, w]`. It is added up by itself:
        in a narrow segment it is far smaller than the latents, whose difference rounding would eat.
    """
    scale = plan.at_segment(plan.guidance, positions)
    unguided = all(weight == 1.0 for weight in plan.guidance)
    way = torch.zeros_like(start)
    for micro_step in range(plan.scheme.s):
        tau = plan.levels(positions, moving, micro_step)
        next_tau = plan.levels(positions, moving, micro_step + 1)
        velocity = guided_velocity(
            teacher, start + way, tau, text, null_text, 1.0 if unguided else scale
        )
        way = euler_step(way, velocity.float(), tau, next_tau)
    return way


def average_velocity(way: Tensor, tau: Tensor, next_tau: Tensor) -> Tensor:
    """Average velocity of a way that was gone, frame by frame; 0 for resting frames."""
    width = per_frame(next_tau - tau)
    moving = width > 0
    return torch.where(moving, way / torch.where(moving, width, 1.0), 0.0)


class LiveRollouts:
    """Rollouts by a teacher in memory.

    Args:
        teacher: frozen velocity function.
        plan: what it is asked for.
    """

    def __init__(self, teacher: VelocityFunction, plan: RolloutPlan) -> None:
        self.teacher = teacher
        self.plan = plan

    @property
    def draw(self) -> Draw:
        """See :meth:`RolloutPlan.draw`."""
        return self.plan.draw

    @torch.no_grad()
    def __call__(self, student: VelocityFunction, batch: Batch, draws: Draws) -> Rollout:
        """Noise the clips to the drawn levels, let streams move some, and walk them."""
        plan, positions, moving = self.plan, draws["positions"], draws["moving"]
        frames = batch.latents.shape[1]
        tau = plan.levels(positions, moving, 0)
        start = interpolate(batch.latents, draws["noise"][:, :frames], tau, plan.sigma_min)
        start = self._drifted(start, student, batch, draws)
        way = teacher_walk(
            self.teacher, start, positions, moving, plan, batch.text, batch.null_text
        )
        target = average_velocity(way, tau, plan.levels(positions, moving, plan.scheme.s))
        return Rollout(start, target, positions, moving, draws["kind"])

    def extra_forwards(self, draws: Draws) -> int:
        """The teacher's walk of every sample, and the streams that are asked."""
        guided = any(weight != 1.0 for weight in self.plan.guidance)
        walk = self.plan.scheme.s * (2 if guided else 1)
        samples = len(draws["origin"])
        return (
            samples * walk
            + moved_samples(self.plan, draws, FROM_TEACHER) * walk
            + moved_samples(self.plan, draws, FROM_STUDENT)
        )

    def _drifted(
        self, start: Tensor, student: VelocityFunction, batch: Batch, draws: Draws
    ) -> Tensor:
        """Replace the buffers that streams shall give."""
        plan = self.plan

        def by_teacher(latents: Tensor, positions: Tensor, text: TextStates) -> Tensor:
            moving = positions < plan.scheme.total_steps
            return latents + teacher_walk(
                self.teacher, latents, positions, moving, plan, text, batch.null_text
            )

        def by_student(latents: Tensor, positions: Tensor, text: TextStates) -> Tensor:
            moving = positions < plan.scheme.total_steps
            tau = plan.levels(positions, moving, 0)
            velocity = student(latents, tau, text).float()
            return euler_step(latents, velocity, tau, plan.levels(positions, moving, plan.scheme.s))

        start = stream_buffers(start, by_teacher, plan, batch.text, draws, FROM_TEACHER)
        return stream_buffers(start, by_student, plan, batch.text, draws, FROM_STUDENT)
