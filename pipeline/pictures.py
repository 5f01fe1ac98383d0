"""Pictures of clips for people: one frame, or a clip played out as a strip."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.child import ChildError
from pipeline.decode import sample_frames

STRIP_FRAMES = 8
JPEG_QUALITY = 80


def clip_frames(
    clip: Mapping[str, Any], count: int, height: int, deadline_s: float = 60.0
) -> list[np.ndarray] | None:
    """Frames of a clip, evenly spread, RGB `uint8 [h, w, 3]`; none if it cannot be decoded."""
    duration_s = clip["end_s"] - clip["start_s"]
    times = [clip["start_s"] + (i + 0.5) / count * duration_s for i in range(count)]
    try:
        return sample_frames(clip["uri"], times, height, deadline_s)
    except ChildError:
        return None


def strip(frames: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Frames of one size side by side, `uint8 [h, w, 3]`, with a white gap."""
    height = frames[0].shape[0]
    white = np.full((height, gap, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (frame, white)]
    return np.concatenate(parts[:-1], axis=1)


def encode_image(picture: np.ndarray, suffix: str = ".jpg") -> bytes:
    """An RGB picture as JPEG or PNG."""
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == ".jpg" else []
    done, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    assert done
    return data.tobytes()


def data_url(picture: np.ndarray) -> str:
    """An RGB picture as JPEG in a `data:` address."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_image(picture)).decode("ascii")
