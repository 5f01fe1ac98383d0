"""One training clip as frames, addressed by presentation time."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from pipeline.decode import (
    DecodeError,
    displayed_size,
    open_stream,
    shown_spans,
    to_rgb,
    tolerance_s,
)


def read_clip(
    path_or_uri: str, start_s: float, frames: int, fps: float, height: int, width: int
) -> np.ndarray:
    """Decode a clip at its training size and rate.

    Frame i is the one on screen at `start_s + i / fps`, so slower videos repeat frames and faster
    ones skip some. Decoding starts at the keyframe before `start_s`.

    Args:
        path_or_uri: path or `s3://` object.
        start_s: start in seconds of presentation time from the video stream's start.
        frames: number of frames.
        fps: their rate.
        height: rows; the picture is cropped centrally to `height : width` and resized.
        width: columns.

    Returns:
        RGB `uint8 [frames, height, width, 3]`, upright, with square pixels.

    Raises:
        DecodeError: if the video ends before the clip does.
        av.error.FFmpegError: if it cannot be decoded.
    """
    clip = np.empty((frames, height, width, 3), np.uint8)
    times = [start_s + i / fps for i in range(frames)]
    written, until_s = 0, 0.0
    with open_stream(path_or_uri) as (container, stream):
        for frame, until_s in shown_spans(container, stream, start_s):
            last = bisect_left(times, until_s - tolerance_s(stream))
            if last > written:
                picture = to_rgb(frame, *displayed_size(frame, stream))
                clip[written:last] = fit(picture, height, width)
                written = last
            if written == frames:
                return clip
    raise DecodeError(
        f"the video ends at {until_s:.3f} s, before the clip's frame at {times[written]:.3f} s"
    )


def read_clip_with_lead(
    path_or_uri: str,
    start_s: float,
    frames: int,
    fps: float,
    height: int,
    width: int,
    scene_start_s: float,
) -> np.ndarray:
    """A clip with one more frame before it, for autoencoders that encode a first frame alone.

    Where the scene starts with the clip there is no such frame, and the first one is doubled.

    Returns:
        RGB `uint8 [1 + frames, height, width, 3]`.
    """
    lead_s = start_s - 1 / fps
    if lead_s >= scene_start_s:
        return read_clip(path_or_uri, lead_s, frames + 1, fps, height, width)
    clip = read_clip(path_or_uri, start_s, frames, fps, height, width)
    return np.concatenate([clip[:1], clip])


def fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop `uint8 [h, w, 3]` centrally to `height : width` and resize it.

    Shrinking averages areas; enlarging interpolates linearly.
    """
    import cv2

    rows, columns = picture.shape[:2]
    scale = max(height / rows, width / columns)
    crop_rows = min(rows, max(1, round(height / scale)))
    crop_columns = min(columns, max(1, round(width / scale)))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    cropped = picture[top : top + crop_rows, left : left + crop_columns]
    if cropped.shape[:2] == (height, width):
        return cropped
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(cropped, (width, height), interpolation=method)
