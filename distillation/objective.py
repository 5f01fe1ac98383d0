"""Multistep distillation (arXiv:2507.03745v4, Sec. 3.4).

The teacher moves a whole buffer through s guided micro steps, which carries every chunk across its
own noise segment. The student learns the average velocity of that walk, so that one step without
guidance does the same: step and guidance distillation at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamdit.config import GammaConfig
from streamdit.flow import (
    VelocityFunction,
    euler_step,
    flow_matching_loss,
    guided_velocity,
    interpolate,
    per_frame,
)
from streamdit.io import load_model
from streamdit.partition import PartitionScheme, step_levels
from streamdit.text.base import TextStates
from training.data import Batch
from training.objective import Draws

if TYPE_CHECKING:
    from training.job import TrainJob


def segment_levels(
    segments: Tensor, scheme: PartitionScheme, micro_step: int, gamma: GammaConfig
) -> Tensor:
    """Tau of frames that lie in `segments` (any shape, 0 = reference) at a micro step."""
    taken = (segments - 1) * scheme.s + micro_step
    return step_levels(
        torch.where(segments == 0, scheme.total_steps, taken), scheme.total_steps, gamma
    )


@torch.no_grad()
def teacher_rollout(
    teacher: VelocityFunction,
    latents: Tensor,
    segments: Tensor,
    scheme: PartitionScheme,
    gamma: GammaConfig,
    text: TextStates,
    null_text: TextStates,
    guidance_scale: float,
) -> Tensor:
    """Carry every frame from the start to the end of its segment in s guided Euler steps.

    Args:
        teacher: velocity function.
        latents: `[b, f, C, h, w]`, each frame at the start of its segment.
        segments: `[b, f]`, noise segment 1 ... N of each frame, 0 for references.
        scheme: gives N and s.
        gamma: noise schedule of the teacher.
        text: states of b prompts.
        null_text: states of the empty prompt, batch 1.
        guidance_scale: w.

    Returns:
        `[b, f, C, h, w]`, each frame at the end of its segment.
    """
    for micro_step in range(scheme.s):
        tau = segment_levels(segments, scheme, micro_step, gamma)
        next_tau = segment_levels(segments, scheme, micro_step + 1, gamma)
        velocity = guided_velocity(teacher, latents, tau, text, null_text, guidance_scale)
        latents = euler_step(latents, velocity, tau, next_tau)
    return latents


def average_velocity(start: Tensor, end: Tensor, tau: Tensor, next_tau: Tensor) -> Tensor:
    """Average velocity between two points of a walk, frame by frame; 0 for resting frames."""
    width = per_frame(next_tau - tau)
    moving = width > 0
    return torch.where(moving, (end - start) / torch.where(moving, width, 1.0), 0.0)


class MultistepDistillation:
    """Student loss: squared distance to the average velocity of the teacher's walk.

    Args:
        teacher: frozen velocity function.
        scheme: K, N, c and the teacher's s.
        gamma: noise schedule, the teacher's own.
        sigma_min: noise left at tau = 1, the teacher's own.
        guidance_scale: w.
        uniform_share: share of samples whose frames all lie in one segment.
    """

    def __init__(
        self,
        teacher: VelocityFunction,
        scheme: PartitionScheme,
        gamma: GammaConfig,
        sigma_min: float,
        guidance_scale: float,
        uniform_share: float,
    ) -> None:
        self.teacher = teacher
        self.scheme = scheme
        self.gamma = gamma
        self.sigma_min = sigma_min
        self.guidance_scale = guidance_scale
        self.uniform_share = uniform_share

    def draw(self, latent_shape: torch.Size, generator: torch.Generator) -> Draws:
        """Noise, and the segment of every frame: the staircase, or one segment for all."""
        noise = torch.randn(latent_shape, generator=generator)
        uniform = torch.rand((), generator=generator) < self.uniform_share
        segment = torch.randint(1, self.scheme.N + 1, (), generator=generator)
        staircase = self.scheme.segments()
        segments = torch.where(uniform, segment.expand_as(staircase), staircase)
        return {"noise": noise, "segments": segments, "uniform": uniform}

    def __call__(
        self, student: VelocityFunction, batch: Batch, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss over all frames that move, and its value on staircase and uniform buffers."""
        segments = draws["segments"]
        tau = segment_levels(segments, self.scheme, 0, self.gamma)
        next_tau = segment_levels(segments, self.scheme, self.scheme.s, self.gamma)
        start = interpolate(batch.latents, draws["noise"], tau, self.sigma_min)
        end = teacher_rollout(
            self.teacher,
            start,
            segments,
            self.scheme,
            self.gamma,
            batch.text,
            batch.null_text,
            self.guidance_scale,
        )
        target = average_velocity(start, end, tau, next_tau)
        moving = (segments > 0).float()
        weight = moving / moving.mean(dim=1, keepdim=True)
        prediction = student(start, tau, batch.text)
        per_sample = flow_matching_loss(prediction, target, weight).mean(dim=1)
        metrics = {}
        for name, rows in (("uniform", draws["uniform"]), ("staircase", ~draws["uniform"])):
            if rows.any():
                metrics[f"loss_{name}"] = per_sample.detach()[rows].mean()
        return per_sample.mean(), metrics


def make_objective(job: TrainJob, device: torch.device) -> MultistepDistillation:
    """Objective of a distillation job; its parent is the teacher."""
    from distillation.config import DistillConfig

    assert isinstance(job.config, DistillConfig)
    assert job.parent is not None
    settings = job.config.teacher
    dtype = torch.bfloat16 if job.config.precision == "bfloat16" else torch.float32
    teacher, teacher_config = load_model(job.parent, device, dtype)
    teacher.eval().requires_grad_(False)
    scheme = PartitionScheme.for_buffer(
        job.model.buffer_frames,
        settings.chunk_frames,
        settings.micro_steps,
        settings.reference_frames,
    )
    return MultistepDistillation(
        teacher,
        scheme,
        teacher_config.partition.gamma,
        teacher_config.partition.sigma_min,
        settings.guidance_scale,
        settings.uniform_share,
    )
