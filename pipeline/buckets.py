"""Which bucket a clip goes to: the length that its scene has room for, the shape of its picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.config import BucketShape, ClipConfig

TOLERANCE_S = 1e-3


class Span(NamedTuple):
    """A clip of a scene."""

    start_s: float
    frames: int


def clip_spans(start_s: float, end_s: float, clip: ClipConfig) -> Iterator[Span]:
    """Clips that a scene from `start_s` to `end_s` gives, in order of time.

    Clips of the longest length that fits come first, `stride_frames` apart; shorter ones, whose
    stride is shorter in proportion, take what is left at the end.
    """
    for frames in clip.lengths:
        stride_s = clip.stride_frames * frames / clip.lengths[0] / clip.fps
        duration_s = frames / clip.fps
        count = 0
        while (at_s := start_s + count * stride_s) + duration_s <= end_s + TOLERANCE_S:
            yield Span(round(at_s, 6), frames)
            count += 1
        if count:
            start_s += (count - 1) * stride_s + duration_s


def best_shape(height: int, width: int, frames: int, clip: ClipConfig) -> BucketShape:
    """The bucket of clips with `frames` frames for a video of `height` rows and `width` columns.

    The one that crops least; of several such, the largest that does not enlarge the picture, or
    else the smallest.
    """
    shapes = [shape for shape in clip.shapes if shape.frames == frames]
    video = width / height
    kept = {s.name: min(video * s.height / s.width, s.width / s.height / video) for s in shapes}
    most = max(kept.values())
    nearest = [shape for shape in shapes if kept[shape.name] >= most - 1e-6]
    fitting = [shape for shape in nearest if shape.height <= height and shape.width <= width]
    if fitting:
        return max(fitting, key=lambda shape: shape.height * shape.width)
    return min(nearest, key=lambda shape: shape.height * shape.width)
