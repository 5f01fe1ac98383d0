"""What a model is trained towards. The trainer knows only the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from streamdit.config import PartitionConfig
from streamdit.flow import VelocityFunction, flow_matching_loss, interpolate, velocity_target
from streamdit.partition import PartitionMixture
from training.data import Batch

if TYPE_CHECKING:
    from training.job import TrainJob

Draws = dict[str, Tensor]
"""All random draws of a batch, each `[b, ...]`."""


class Objective(Protocol):
    """A loss on a batch, split into its random draws and everything else.

    The draws of a sample come from that sample's own generator, so they do not depend on the
    number of workers or on where a run was resumed.
    """

    def draw(
        self, latent_shape: torch.Size, generator: torch.Generator, progress: float = 0.0
    ) -> Draws:
        """Draws of one sample with latents of `latent_shape` `[f, C, h, w]`.

        `progress` is the share of the run's steps that are done.
        """
        ...

    def __call__(
        self, student: VelocityFunction, batch: Batch, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar, float32) and named metrics (detached scalars)."""
        ...


def stack_draws(draws: Sequence[Draws]) -> Draws:
    """Draws of single samples as draws of a batch."""
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


class FlowMatching:
    """Buffered flow matching with mixed partitions (arXiv:2507.03745v4, Eqs. 3, 5, 6, 8).

    Args:
        partition: training mix, schedule and sigma_min.
        buffer_frames: B.
        caption_dropout: share of captions replaced by the empty one.
    """

    def __init__(
        self, partition: PartitionConfig, buffer_frames: int, caption_dropout: float
    ) -> None:
        self.mixture = PartitionMixture(partition, buffer_frames)
        self.sigma_min = partition.sigma_min
        self.caption_dropout = caption_dropout

    def draw(
        self, latent_shape: torch.Size, generator: torch.Generator, progress: float = 0.0
    ) -> Draws:
        """Scheme and tau, noise, and whether the caption is kept."""
        partition = self.mixture.draw(generator)
        return {
            "tau": partition.tau,
            "weight": partition.weight,
            "chunk_frames": torch.tensor(partition.scheme.c),
            "noise": torch.randn(latent_shape, generator=generator),
            "keep_caption": torch.rand((), generator=generator) >= self.caption_dropout,
        }

    def __call__(
        self, student: VelocityFunction, batch: Batch, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared velocity error; metrics give it per chunk size too."""
        latents = interpolate(batch.latents, draws["noise"], draws["tau"], self.sigma_min)
        target = velocity_target(batch.latents, draws["noise"], self.sigma_min)
        text = batch.text.where(draws["keep_caption"], batch.null_text)
        prediction = student(latents, draws["tau"], text)
        per_sample = flow_matching_loss(prediction, target, draws["weight"]).mean(dim=1)
        metrics = {}
        for chunk in draws["chunk_frames"].unique().tolist():
            rows = draws["chunk_frames"] == chunk
            metrics[f"loss_chunk_{chunk}"] = per_sample.detach()[rows].mean()
        return per_sample.mean(), metrics


def make_flow_matching(job: TrainJob, device: torch.device) -> FlowMatching:
    """Objective of an ordinary training job."""
    from training.config import TrainConfig

    assert isinstance(job.config, TrainConfig)
    return FlowMatching(job.partition, job.model.buffer_frames, job.config.caption_dropout)
