"""How large a project is and how long it takes: arithmetic from shapes, operations and rates.

Everything here is a formula over numbers that are given; nothing is measured. Units are SI: bytes,
seconds, bytes per second, operations per second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamdit.config import BucketConfig, DiTConfig

BF16 = 2
"""Bytes of a stored number."""
CHECKPOINT_BYTES = 2 + 12 + 4
"""Per parameter: bf16 weights, AdamW's float32 master weights and two moments, averaged weights."""
FORWARD_AND_BACKWARD = 3
"""Operations of a training step per operation of a forward pass; what MFU counts."""


@dataclass(frozen=True)
class DatasetSize:
    """A dataset on disk.

    Attributes:
        clips: number of clips.
        latent_bytes: latents of one clip.
        text_bytes: text states of one caption.
        shard_bytes: payload of one file.
    """

    clips: float
    latent_bytes: float
    text_bytes: float
    shard_bytes: float

    @property
    def clip_bytes(self) -> float:
        """What the trainer reads for one sample."""
        return self.latent_bytes + self.text_bytes

    @property
    def bytes(self) -> float:
        """All shards."""
        return self.clips * self.clip_bytes

    @property
    def shards(self) -> int:
        """Files, of latents and of text states."""
        return math.ceil(self.clips * self.latent_bytes / self.shard_bytes) + math.ceil(
            self.clips * self.text_bytes / self.shard_bytes
        )


def dataset_size(
    clips: float, model: DiTConfig, bucket: BucketConfig, caption_tokens: float, shard_bytes: float
) -> DatasetSize:
    """Size of a dataset for a model.

    Args:
        clips: number of clips.
        model: whose latents and text states are stored, both in bf16.
        bucket: latent grid of a clip.
        caption_tokens: mean tokens of a caption, per text encoder; states are stored unpadded.
        shard_bytes: payload of one file.
    """
    latent = bucket.frames * model.latent_channels * bucket.height * bucket.width * BF16
    text = caption_tokens * sum(model.text.values()) * BF16
    return DatasetSize(clips, latent, text, shard_bytes)


@dataclass(frozen=True)
class Fleet:
    """GPUs that train together.

    Attributes:
        gpus: how many.
        peak: operations per second of one, bf16.
        mfu: share of the peak that training reaches, by the operations of forward and backward.
    """

    gpus: int
    peak: float
    mfu: float

    def step_seconds(self, flops: float) -> float:
        """Time of a step of `flops` operations, all GPUs together."""
        return flops / (self.gpus * self.peak * self.mfu)


def training_flops(forward: float, batch: int) -> float:
    """Operations of one optimizer step with buffered flow matching."""
    return FORWARD_AND_BACKWARD * forward * batch


def distillation_flops(forward: float, batch: int, micro_steps: int, guided: bool) -> float:
    """Operations of one distillation step: the teacher's walk, then the student's own step."""
    teacher = micro_steps * (2 if guided else 1)
    return (teacher + FORWARD_AND_BACKWARD) * forward * batch


def gradient_traffic(parameters: int, zero_stage: int, gpus: int) -> float:
    """Bytes that one GPU sends in an optimizer step, ring collectives, bf16.

    Stages 1 and 2 reduce gradients to their shards and gather the updated weights; stage 3 gathers
    weights twice, for the forward and the backward pass, and reduces gradients.
    """
    passes = 3 if zero_stage == 3 else 2
    return passes * BF16 * parameters * (gpus - 1) / gpus


@dataclass(frozen=True)
class Failures:
    """What crashes cost.

    Attributes:
        mtbf: mean seconds between failures of the whole fleet.
        save: seconds to write a checkpoint, during which training waits.
        restart: seconds from a failure until training goes on.
    """

    mtbf: float
    save: float
    restart: float

    @property
    def best_interval(self) -> float:
        """Seconds of work between checkpoints that lose least (Daly 2006, first order)."""
        return max(math.sqrt(2 * self.save * (self.mtbf + self.restart)) - self.save, self.save)

    def loss(self, interval: float) -> float:
        """Expected share of time lost: saving, work done again, restarting (first order).

        Args:
            interval: seconds of work between checkpoints.
        """
        cycle = interval + self.save
        return self.save / cycle + (cycle / 2 + self.restart) / self.mtbf


def checkpoint_bytes(parameters: int) -> float:
    """One checkpoint, all ranks together."""
    return CHECKPOINT_BYTES * parameters


@dataclass(frozen=True)
class IngestRates:
    """Measured speeds of ingestion.

    Attributes:
        curate: seconds of raw video that one CPU core curates in a second.
        annotate: clips that one CPU core annotates in a second.
        encode: clips that one GPU encodes in a second.
    """

    curate: float
    annotate: float
    encode: float

    def seconds(self, video_s: float, clips: float, cpus: int, gpus: int) -> dict[str, float]:
        """Time of the three jobs, one after the other.

        Args:
            video_s: seconds of video that are looked at, kept or not.
            clips: that are kept.
            cpus: cores that curate and annotate.
            gpus: that encode.
        """
        return {
            "curate": video_s / (self.curate * cpus),
            "annotate": clips / (self.annotate * cpus),
            "encode": clips / (self.encode * gpus),
        }
