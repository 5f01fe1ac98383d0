"""What a model is trained towards. The trainer knows only the protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from streamdit.config import PartitionConfig
from streamdit.flow import VelocityFunction, flow_matching_loss, interpolate, velocity_target
from streamdit.partition import PartitionMixture, apply_gamma
from training.data import Batch
from training.weighting import LossWeighting, noise_weights

if TYPE_CHECKING:
    from training.job import TrainJob

MOST_SEGMENTS = 8
"""Noise segments that the loss is reported by, unless the mixture has fewer."""

Draws = dict[str, Tensor]
"""All random draws of a batch, each `[b, ...]`."""


class Mean(NamedTuple):
    """A mean that is not taken yet, so that those of micro-batches and ranks can be added up.

    Attributes:
        total: weighted sum, scalar.
        weight: sum of the weights, scalar; 0 where there was nothing to measure.
    """

    total: Tensor
    weight: Tensor


Metrics = dict[str, Mean | Tensor]
"""Detached figures by name; a plain scalar counts with weight 1."""

Figures = Callable[[], Metrics]
"""Computes the figures to log when it is called: few steps are logged."""


class Draw(Protocol):
    """Makes the draws of one sample, from its own generator.

    So they do not depend on the number of workers or on where a run was resumed. They are made
    ahead, beside the reading: what makes them is picklable and holds no model.
    """

    def __call__(
        self, latent_shape: torch.Size, generator: torch.Generator, progress: float = 0.0
    ) -> Draws:
        """Draws of one sample with latents of `latent_shape` `[f, C, h, w]`.

        `progress` is the share of the run's steps that are done.
        """
        ...


class Objective(Protocol):
    """A loss on a batch, split into its random draws and everything else."""

    @property
    def draw(self) -> Draw:
        """What makes the draws of a sample."""
        ...

    def __call__(
        self, student: VelocityFunction, batch: Batch, draws: Draws
    ) -> tuple[Tensor, Figures]:
        """Loss (scalar, float32) and figures to log."""
        ...

    def extra_forwards(self, draws: Draws) -> int:
        """Forward passes, one sample each, beside the student's own on a batch of these draws.

        They are of models of the student's shape: a teacher, or the student making its own input.
        """
        ...


def stack_draws(draws: Sequence[Draws]) -> Draws:
    """Draws of single samples as draws of a batch."""
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@dataclass(frozen=True)
class MixtureDraw:
    """Draws a scheme and tau, noise, and whether the caption is kept.

    Attributes:
        mixture: partitions to draw from.
        caption_dropout: share of captions replaced by the empty one.
    """

    mixture: PartitionMixture
    caption_dropout: float

    def __call__(
        self, latent_shape: torch.Size, generator: torch.Generator, progress: float = 0.0
    ) -> Draws:
        """Draws of one sample; the same at any progress."""
        partition = self.mixture.draw(generator)
        return {
            "tau": partition.tau,
            "weight": partition.weight,
            "chunk_frames": torch.tensor(partition.scheme.c),
            "noise": torch.randn(latent_shape, generator=generator),
            "keep_caption": torch.rand((), generator=generator) >= self.caption_dropout,
        }


class FlowMatching:
    """Buffered flow matching with mixed partitions (arXiv:2507.03745v4, Eqs. 3, 5, 6, 8).

    Args:
        partition: training mix, schedule and sigma_min.
        buffer_frames: B.
        caption_dropout: share of captions replaced by the empty one.
        device: where batches will lie; default: the CPU.
        weighting: how frames count in the loss by their noise level.
    """

    def __init__(
        self,
        partition: PartitionConfig,
        buffer_frames: int,
        caption_dropout: float,
        device: torch.device | None = None,
        weighting: LossWeighting = "uniform",
    ) -> None:
        mixture = PartitionMixture(partition, buffer_frames)
        self.draw = MixtureDraw(mixture, caption_dropout)
        self.chunk_sizes = sorted({scheme.c for scheme in mixture.schemes})
        segments = min(MOST_SEGMENTS, max(scheme.N for scheme in mixture.schemes))
        # Ends of the noise segments that the loss is reported by, the noisiest first.
        ends = apply_gamma(torch.arange(1, segments) / segments, partition.gamma)
        # Copied once: a copy in a step would make the host wait for the device.
        self.segment_ends = ends.to(device)
        self.sizes = torch.tensor(self.chunk_sizes, device=device)
        self.sigma_min = partition.sigma_min
        self.weighting = weighting

    def __call__(
        self, student: VelocityFunction, batch: Batch, draws: Draws
    ) -> tuple[Tensor, Figures]:
        """Mean squared velocity error, weighted by noise level.

        Figures give it per chunk size and noise segment, where all frames count alike.
        """
        latents = interpolate(batch.latents, draws["noise"], draws["tau"], self.sigma_min)
        target = velocity_target(batch.latents, draws["noise"], self.sigma_min)
        text = batch.text.where(draws["keep_caption"], batch.null_text)
        prediction = student(latents, draws["tau"], text)
        per_frame = flow_matching_loss(prediction, target, draws["weight"])
        figures = partial(self._figures, per_frame.detach(), draws)
        if self.weighting != "uniform":
            per_frame = per_frame * noise_weights(self.weighting, draws["tau"])
        return per_frame.mean(dim=1).mean(), figures

    def extra_forwards(self, draws: Draws) -> int:
        """None: the student answers once."""
        return 0

    def _figures(self, per_frame: Tensor, draws: Draws) -> Metrics:
        """Figures of a batch with these losses `[b, f]`."""
        chunks = self._by_chunk_size(per_frame.mean(dim=1), draws["chunk_frames"])
        return chunks | self._by_segment(per_frame, draws["weight"], draws["tau"])

    def _by_chunk_size(self, per_sample: Tensor, chunk_frames: Tensor) -> Metrics:
        """Loss of the samples of each chunk size."""
        member = chunk_frames[:, None] == self.sizes
        totals, weights = (per_sample[:, None] * member).sum(dim=0), member.sum(dim=0)
        return {
            f"loss_chunk_{size}": Mean(totals[index], weights[index])
            for index, size in enumerate(self.chunk_sizes)
        }

    def _by_segment(self, per_frame: Tensor, weight: Tensor, tau: Tensor) -> Metrics:
        """Loss of the frames in each noise segment, 1 the noisiest; references lie in none."""
        ends = self.segment_ends
        member = one_hot(torch.bucketize(tau, ends, right=True), len(ends) + 1)
        totals = (per_frame[..., None] * member).sum(dim=(0, 1))
        weights = (weight[..., None] * member).sum(dim=(0, 1))
        return {
            f"loss_segment_{index + 1}": Mean(totals[index], weights[index])
            for index in range(len(ends) + 1)
        }


def make_flow_matching(job: TrainJob, device: torch.device) -> FlowMatching:
    """Objective of an ordinary training job."""
    from training.config import TrainConfig

    assert isinstance(job.config, TrainConfig)
    config = job.config
    return FlowMatching(
        job.partition,
        job.model.buffer_frames,
        config.caption_dropout,
        device,
        config.loss_weighting,
    )
