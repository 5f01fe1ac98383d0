"""Typed configuration of an autoencoder's training; presets are `configs/autoencoder/*.yaml`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamdit.autoencoder.causal import FACTORS, CausalAutoencoderConfig
from streamdit.config import StrictModel


class AutoencoderLossConfig(StrictModel):
    """Weights of the loss; every term is a mean over its elements."""

    l1: float = Field(default=1.0, ge=0)
    """Absolute error of pixels in -1...1."""
    l2: float = Field(default=1.0, ge=0)
    """Squared error of pixels."""
    gradient: float = Field(default=0.0, ge=0)
    """Absolute error of the differences between neighbouring pixels: crisp edges."""
    temporal: float = Field(default=0.0, ge=0)
    """Absolute error of the differences between consecutive frames: no flicker."""
    kl: float = Field(default=1e-5, ge=0)
    """Kullback-Leibler divergence of the posterior from a unit Gaussian: compact latents."""


class AutoencoderTrainConfig(StrictModel):
    """Everything that decides how an autoencoder is trained."""

    model: CausalAutoencoderConfig = CausalAutoencoderConfig()
    """Architecture."""
    steps: int = Field(default=100_000, gt=0)
    """Optimizer steps."""
    seconds: float | None = Field(default=None, gt=0)
    """Stop after this much time of training even if `steps` are not done; the learning rate then
    falls with time. Two runs with a time limit that bites are not identical."""
    batch: int = Field(default=8, gt=0)
    """Clips per step."""
    frames: int = Field(default=16, gt=0, multiple_of=FACTORS[0])
    """Consecutive video frames cut from a clip."""
    crop: tuple[int, int] | None = None
    """Rows and columns cut from the picture; none takes all of it."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of the networks (AdamW)."""
    linear_rate_share: float = Field(default=0.1, ge=0)
    """Learning rate of the linear path, relative: it starts at its optimum."""
    warmup_steps: int = Field(default=500, ge=0)
    """Steps in which the learning rate rises; afterwards it falls by a cosine."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    """Weights of the loss."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, data order and noise."""
    fit_clips: int = Field(default=64, gt=0)
    """Training clips that the linear path is fitted to."""
    normalisation: Literal["channel", "shared"] = "channel"
    """`channel`: every latent channel is scaled to unit variance. `shared`: one scale for all, so
    that channels keep their share of the variance and small models learn what matters first."""
    statistics_clips: int = Field(default=64, gt=0)
    """Training clips over which the latents' scale and shift are measured."""
    held_out_share: float = Field(default=0.02, ge=0, lt=1)
    """Share of sources kept from training; give what `ingest` has (selection.held_out_share)."""
    held_out_clips: int = Field(default=16, gt=0)
    """Held-out clips on which reconstruction is measured."""
    held_out_every: int = Field(default=5_000, gt=0)
    """Steps between two measurements."""
    log_every: int = Field(default=50, gt=0)
    """Steps between two log lines."""
    checkpoint_every: int = Field(default=1_000, gt=0)
    """Steps between two checkpoints."""
    cache_mb: float = Field(default=2_048.0, ge=0)
    """Megabytes of decoded clips kept in memory."""
    workers: int = Field(default=2, gt=0)
    """Threads that decode clips ahead."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of the model; none leaves PyTorch's choice."""


UNESSENTIAL = ("held_out_every", "log_every", "checkpoint_every", "cache_mb", "workers", "threads")
"""Settings that a resumed run may change, since they do not change what is learned."""
