"""The contract between video frames and latents that every autoencoder fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from streamdit.config import AutoencoderIdentity

DecoderState = Any
"""What a decoder carries from one chunk of latents to the next; owned by the stream."""

EncoderState = Any
"""What an encoder carries from one window of frames to the next."""


class Autoencoder(nn.Module, ABC):
    """Causal video autoencoder.

    `encode` and `decode` speak raw latents (the posterior mean, unscaled), which is what shards
    store; `normalise` and `denormalise` map them to and from the unit scale that the diffusion
    model works in.
    """

    identity: AutoencoderIdentity
    """Kind, source, hash and normalisation; written to manifests and model directories."""

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Encode a clip.

        Args:
            frames: `[b, t, 3, H, W]` floating in -1...1, with `t` one of the lengths that
                :meth:`frames_for` gives for a first chunk.

        Returns:
            Raw latents `[b, f, C, H / spatial, W / spatial]`.
        """

    @abstractmethod
    def encode_next(
        self, frames: Tensor, state: EncoderState | None = None
    ) -> tuple[Tensor, EncoderState]:
        """Encode the next frames of a long clip.

        Encoding a clip window by window, handing `state` on, equals encoding it whole, in the
        memory of a window.

        Args:
            frames: `[b, t, 3, H, W]` as for :meth:`encode` at the beginning of a clip; then any
                multiple of the temporal factor.
            state: what the previous call returned, or None at the beginning. It is not modified.

        Returns:
            Raw latents `[b, f, C, H / spatial, W / spatial]`, and the next state.
        """

    @abstractmethod
    def decode(
        self, latents: Tensor, state: DecoderState | None = None
    ) -> tuple[Tensor, DecoderState]:
        """Decode the next latents of a stream.

        Decoding a sequence chunk by chunk, handing `state` on, equals decoding it whole.

        Args:
            latents: raw latents `[b, f, C, h, w]`.
            state: what the previous call returned, or None at the start of a stream. It is not
                modified, so a stream can be replayed from any state.

        Returns:
            Frames `[b, t, 3, H, W]` in about -1...1 with
            `t = frames_for(f, first=state is None)`, and the next state.
        """

    def frames_for(self, latents: int, first: bool) -> int:
        """Video frames that `latents` latent frames decode to; `first` at a stream's start."""
        frames = latents * self.identity.temporal_factor
        if first and self.identity.first_frame_alone:
            frames -= self.identity.temporal_factor - 1
        return frames

    def latents_for(self, frames: int) -> int:
        """Latent frames of a clip of `frames` video frames.

        Raises:
            ValueError: if no whole number of latents encodes this many frames.
        """
        factor = self.identity.temporal_factor
        if self.identity.first_frame_alone:
            latents, rest = divmod(frames - 1 + factor, factor)
            form = f"1 + {factor}k"
        else:
            latents, rest = divmod(frames, factor)
            form = f"{factor}k"
        if rest or latents < 1:
            raise ValueError(
                f"{frames} frames cannot be encoded by the {self.identity.kind} autoencoder; "
                f"use a clip of {form} frames"
            )
        return latents

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents `[..., C, h, w]` to unit scale: `(latents - shift) * scale`."""
        shift, scale = self._statistics(latents)
        return (latents - shift) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        shift, scale = self._statistics(latents)
        return latents / scale + shift

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return _statistics_on(self.identity, latents.device, latents.dtype)


def latent_statistics(identity: AutoencoderIdentity) -> tuple[Tensor, Tensor]:
    """`(shift, scale)`, each `[C, 1, 1]` float32, of an autoencoder's latents."""
    return (
        torch.tensor(identity.shift).view(-1, 1, 1),
        torch.tensor(identity.scale).view(-1, 1, 1),
    )


@lru_cache(maxsize=64)
def _statistics_on(
    identity: AutoencoderIdentity, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Kept, since copying them at every chunk of a stream would make the host wait."""
    shift, scale = latent_statistics(identity)
    return shift.to(device, dtype), scale.to(device, dtype)
