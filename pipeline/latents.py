"""Clips to latents and captions to text states: what the encode actors compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.config import BucketShape
from pipeline.schema import encode_tensor
from streamdit.autoencoder.base import Autoencoder
from streamdit.config import AutoencoderIdentity
from streamdit.errors import UserError
from streamdit.text.base import TextEncoders

Row = dict[str, Any]


def latent_shape(autoencoder: Autoencoder, clip: BucketShape) -> tuple[int, int, int, int]:
    """`[f, C, h, w]` of the latent that is stored for a clip.

    Every stored latent frame stands for `temporal_factor` video frames. An autoencoder whose first
    latent encodes a single frame (Wan) is therefore given one more frame before the clip, and that
    first latent is dropped: streaming windows must not start with it.

    Raises:
        UserError: if the autoencoder cannot encode clips of this length or size.
    """
    identity = autoencoder.identity
    if clip.frames % identity.temporal_factor:
        raise UserError(
            f"clip.frames {clip.frames} does not fit the {identity.kind} autoencoder, whose "
            f"latents stand for {identity.temporal_factor} frames each: use a multiple of "
            f"{identity.temporal_factor}"
        )
    for name, pixels in (("height", clip.height), ("width", clip.width)):
        if pixels % identity.spatial_factor:
            raise UserError(
                f"clip.{name} {pixels} does not fit the {identity.kind} autoencoder, which shrinks "
                f"pictures {identity.spatial_factor} times: use a multiple of "
                f"{identity.spatial_factor}"
            )
    lead = lead_latents(identity)
    frames = autoencoder.latents_for(clip.frames + lead) - lead
    height, width = clip.height // identity.spatial_factor, clip.width // identity.spatial_factor
    return frames, identity.latent_channels, height, width


def lead_latents(identity: AutoencoderIdentity) -> int:
    """Latents (of one frame each) before a clip that are encoded but not stored."""
    return 1 if identity.first_frame_alone else 0


def clip_bytes(shape: BucketShape, lead: int) -> int:
    """Bytes of the frames that are decoded for one clip, `lead` of them before it."""
    return (shape.frames + lead) * shape.height * shape.width * 3


@torch.no_grad()
def encode_frames(autoencoder: Autoencoder, clips: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Raw latents `[b, f, C, h, w]` of clips `uint8 [b, t, H, W, 3]`, on the CPU."""
    parameter = next(autoencoder.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    frames = torch.from_numpy(clips).to(device)
    unit = frames.permute(0, 1, 4, 2, 3).to(torch.float32) / 127.5 - 1.0
    latents = autoencoder.encode(unit)[:, lead_latents(autoencoder.identity) :]
    return latents.to(device="cpu", dtype=dtype)


def latent_row(clip: Row, latent: torch.Tensor) -> Row:
    """Row of a latent shard."""
    data, shape, dtype, crc = encode_tensor(latent)
    return {
        "clip_id": clip["clip_id"],
        "source_id": clip["source_id"],
        "frames": clip["frames"],
        "latent": data,
        "latent_shape": shape,
        "latent_dtype": dtype,
        "latent_crc": crc,
    }


@torch.no_grad()
def text_rows(encoders: TextEncoders, captions: Sequence[Row], dtype: torch.dtype) -> Iterator[Row]:
    """Rows of a text shard for rows with `clip_id`, `caption` and `caption_model`."""
    states = encoders.encode([row["caption"] for row in captions]).unpadded()
    for row, state in zip(captions, states, strict=True):
        columns: Row = {name: row[name] for name in ("clip_id", "caption", "caption_model")}
        for name, values in state.items():
            data, shape, kind, crc = encode_tensor(values.to(dtype))
            columns[f"text_{name}"] = data
            columns[f"text_{name}_shape"] = shape
            columns[f"text_{name}_dtype"] = kind
            columns[f"text_{name}_crc"] = crc
        yield columns


def batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
