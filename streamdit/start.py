"""What a stream begins from, besides its prompt: a video to follow, or one to continue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from streamdit.config import BucketConfig, StartKind
from streamdit.errors import UserError
from streamdit.flow import velocity_target

if TYPE_CHECKING:
    from streamdit.autoencoder.base import Autoencoder


ENCODED_LATENTS = 8
"""Latent frames that are encoded at a time: a long video takes no more memory than a short one."""


@dataclass(frozen=True)
class Guide:
    """A video that a stream follows for the first part of every frame's way (SDEdit).

    Frame f of the stream begins on the path from its noise to frame f of the guide. The model
    takes over for the last `strength` of the frame's T steps, so 1 ignores the guide and 0 gives
    it back. The share is rounded to whole steps, of which a student has few, but a frame follows
    for one step at least, and is left for one, unless the strength is 1 or 0. Frames behind the
    guide's end are the model's own.

    Attributes:
        latents: `[b, f, C, h, w]` normalised; b = 1 serves all streams.
        strength: share of the T steps that the model takes, 0...1.
        sigma_min: noise left at tau = 1, as the model was trained.
    """

    latents: Tensor
    strength: float
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise UserError(
                f"strength {self.strength:g} is not a share; choose 0 (give the video back) "
                "to 1 (ignore it)"
            )

    def followed_steps(self, total_steps: int) -> int:
        """Steps of T in which a frame follows the guide."""
        if self.strength in (0.0, 1.0) or total_steps == 1:
            return total_steps - round(self.strength * total_steps)
        return min(max(total_steps - round(self.strength * total_steps), 1), total_steps - 1)

    def velocity(self, first: int, noise: Tensor) -> Tensor:
        """Velocity from `noise [b, n, C, h, w]` of frames `first` ... to the guide.

        It is 0 behind the guide's end.
        """
        velocity = torch.zeros_like(noise)
        data = self.latents[:, first : first + noise.shape[1]].to(noise)
        there = data.shape[1]
        velocity[:, :there] = velocity_target(data, noise[:, :there], self.sigma_min)
        return velocity


@dataclass(frozen=True)
class StreamStart:
    """How a stream fills its first buffer.

    Attributes:
        kind: `text-to-video` (arXiv:2507.03745v4, Fig. 13) or `ramp`.
        guide: video that the stream follows.
        references: the K clean frames before the stream, `[b, K, C, h, w]` normalised; b = 1 serves
            all streams.
    """

    kind: StartKind = "text-to-video"
    guide: Guide | None = None
    references: Tensor | None = None


def fit_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale frames uint8 `[n, H, W, 3]` to cover `height x width` and cut what stands over.

    Pixels are averaged when scaled down (antialiased bicubic).
    """
    if frames.shape[1:3] == (height, width):
        return frames
    factor = max(height / frames.shape[1], width / frames.shape[2])
    size = [
        max(height, round(frames.shape[1] * factor)),
        max(width, round(frames.shape[2] * factor)),
    ]
    parts = [
        torch.nn.functional.interpolate(
            torch.from_numpy(part).movedim(-1, 1).float(),
            size=size,
            mode="bicubic",
            antialias=True,
        )
        for part in np.array_split(frames, max(1, len(frames) // 32))
    ]
    scaled = torch.cat([part.clamp(0, 255).round().byte() for part in parts]).movedim(1, -1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, top : top + height, left : left + width].contiguous().numpy()


@torch.no_grad()
def encode_frames(
    autoencoder: Autoencoder, bucket: BucketConfig, frames: np.ndarray, to_the_end: bool = False
) -> Tensor:
    """Normalised latents `[1, f, C, h, w]` of frames uint8 `[n, H, W, 3]`, fitted to a bucket.

    Frames that are too few for another latent are dropped: the last ones, or the first ones with
    `to_the_end`, for a stream that goes on behind the last. Where the autoencoder encodes a first
    frame alone, the first is repeated before the clip and its latent left out, since a stream's
    latents all stand for whole groups of frames.

    Raises:
        UserError: if there are fewer frames than one latent stands for.
    """
    identity = autoencoder.identity
    factor = identity.temporal_factor
    count = len(frames) // factor * factor
    if count == 0:
        raise UserError(
            f"a video of {len(frames)} frames is too short; give at least {factor} frames"
        )
    scale = identity.spatial_factor
    kept = frames[-count:] if to_the_end else frames[:count]
    fitted = fit_frames(kept, bucket.height * scale, bucket.width * scale)
    alone = int(identity.first_frame_alone)
    if alone:
        fitted = np.concatenate([fitted[:1], fitted])
    device = next(autoencoder.parameters()).device
    # The first window has the frame that is encoded alone too.
    ends = range(alone + ENCODED_LATENTS * factor, len(fitted), ENCODED_LATENTS * factor)
    state, latents = None, []
    for window in np.split(fitted, list(ends)):
        video = torch.from_numpy(window).to(device).movedim(-1, 1)[None].float() / 127.5 - 1.0
        encoded, state = autoencoder.encode_next(video, state)
        latents.append(autoencoder.normalise(encoded))
    return torch.cat(latents, dim=1)[:, alone:]
