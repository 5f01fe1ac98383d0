"""Pictures and videos that a stream follows or continues, as frames at the model's rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.clips import read_clip
from pipeline.decode import DecodeError, probe
from streamdit.errors import UserError
from streamdit.loading import StreamingModel


def read_image(path: Path) -> np.ndarray:
    """A picture as one frame uint8 `[1, H, W, 3]`, upright.

    Raises:
        UserError: if the file is no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(
            f"{path}: cannot be read as a picture ({error}); give a PNG or JPEG"
        ) from None


def read_source(path: Path, model: StreamingModel, most: int, from_end: bool = False) -> np.ndarray:
    """At most `most` frames of a video, uint8 `[n, H, W, 3]`, at the model's size and rate.

    Args:
        path: any video that FFmpeg decodes.
        model: gives size and rate.
        most: frames wanted; a shorter video gives what it has.
        from_end: take the last frames instead of the first.

    Raises:
        UserError: if the file is no video, or does not say how long it is.
    """
    import av

    fps = model.config.fps
    try:
        duration = probe(str(path)).duration_s
        if not duration:
            raise DecodeError("it does not say how long it is; remux it with ffmpeg -c copy")
        there = max(1, int(duration * fps + 1e-3))
        frames = min(most, there)
        start = (there - frames) / fps if from_end else 0.0
        return read_clip(str(path), start, frames, fps, *video_size(model))
    except (OSError, DecodeError, av.FFmpegError) as error:
        raise UserError(
            f"{path}: cannot be read as video ({error}); give a file that FFmpeg decodes"
        ) from None


def video_size(model: StreamingModel) -> tuple[int, int]:
    """Rows and columns of the model's video."""
    bucket, scale = model.config.model.buckets[0], model.autoencoder.identity.spatial_factor
    return bucket.height * scale, bucket.width * scale
