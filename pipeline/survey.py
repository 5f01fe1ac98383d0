"""One low-resolution pass over a video: its scenes, its training clips, and their scores."""

from __future__ import annotations

import hashlib
from typing import Any

from pipeline.buckets import Span, best_shape, clip_spans
from pipeline.child import report_progress
from pipeline.config import BucketShape, ClipConfig, SceneConfig
from pipeline.decode import DecodeError, VideoInfo, probe, scan
from pipeline.scenes import Scene, SceneFinder
from pipeline.scores import FrameScores

# A frame more or less is nothing; a container that promises far more than it holds was cut off.
MISSING_SHARE = 0.05
MISSING_FRAMES = 3
DEFAULT_FPS = 25.0


class TruncatedVideoError(DecodeError):
    """A video ends well before its header says."""


class NoFrameTimesError(DecodeError):
    """A video is no moving picture: it lasts no time."""


class StillVideoError(DecodeError):
    """A video shows one picture from its first frame to its last."""


def survey(
    uri: str,
    source_id: str,
    clip: ClipConfig,
    scenes: SceneConfig,
    salvage: bool = False,
    still: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Decode the video once and describe it.

    Args:
        uri: path or `s3://` object.
        source_id: its identity, from which the clips' follow.
        clip: shape of training clips.
        scenes: scene detection.
        salvage: take the good beginning of a video that is damaged or cut off.
        still: take a video in which nothing moves.

    Returns:
        Its row of the source table (:data:`pipeline.schema.SOURCE_SCHEMA`), and the rows of its
        clips (:data:`pipeline.schema.CLIP_SCHEMA`).

    Raises:
        DecodeError: if it holds no moving picture (and `still` is not set), or is truncated and not
            to be salvaged.
            FFmpeg's errors pass through.
    """
    info = probe(uri)
    finder = SceneFinder(scenes, info.fps or DEFAULT_FPS)
    scores = FrameScores()
    end_s = _look_at_all(uri, scenes.scan_height, info, finder, scores, salvage)
    if scores.is_still and not still:
        raise StillVideoError(_still_reason(len(finder.times), end_s))
    found = finder.scenes(end_s)
    shapes = {n: best_shape(info.height, info.width, n, clip) for n in clip.lengths}
    clips = [
        _clip_row(uri, source_id, clip, index, scene, span, shapes[span.frames], scores)
        for index, scene in enumerate(found)
        for span in clip_spans(scene.start_s, scene.end_s, clip)
    ]
    source = {
        "source_id": source_id,
        "uri": uri,
        "codec": info.codec,
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "frames": len(finder.times),
        "duration_s": end_s,
        "scenes": len(found),
        "clips": len(clips),
    }
    return source, clips


def _look_at_all(
    uri: str, height: int, info: VideoInfo, finder: SceneFinder, scores: FrameScores, salvage: bool
) -> float:
    """Show every frame to `finder` and `scores`; returns when the video, or its good part, ends.

    A child's deadline is for one picture here: a film may take as long as it is.
    """
    from av.error import FFmpegError

    try:
        for time_s, picture in scan(uri, height):
            finder.add(time_s, picture)
            scores.add(time_s, picture)
            report_progress()
        end_s = _end_of(finder.times, info)
        _check_whole(info, len(finder.times), end_s)
    except (FFmpegError, TruncatedVideoError):
        if not salvage or len(finder.times) <= MISSING_FRAMES:
            raise
        # Decoders make up what is missing of the last pictures before a break.
        return finder.times[-MISSING_FRAMES]
    return end_s


def clip_identity(source_id: str, start_s: float, end_s: float, fps: float, frames: int) -> str:
    """Identity of a clip: which span of which content, at what rate; 16 hexadecimal digits."""
    text = f"{source_id}:{start_s:.6f}:{end_s:.6f}:{fps:g}:{frames}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _clip_row(
    uri: str,
    source_id: str,
    clip: ClipConfig,
    index: int,
    scene: Scene,
    span: Span,
    shape: BucketShape,
    scores: FrameScores,
) -> dict[str, Any]:
    start_s, frames = span
    end_s = round(start_s + frames / clip.fps, 6)
    return {
        "clip_id": clip_identity(source_id, start_s, end_s, clip.fps, frames),
        "source_id": source_id,
        "uri": uri,
        "start_s": start_s,
        "end_s": end_s,
        "fps": clip.fps,
        "bucket": shape.name,
        "frames": frames,
        "height": shape.height,
        "width": shape.width,
        "scene": index,
        "scene_start_s": scene.start_s,
        "scene_end_s": scene.end_s,
        **scores.summarise(start_s, end_s),
    }


def _end_of(times: list[float], info: VideoInfo) -> float:
    """When the last frame leaves the screen: it stays as long as frames do on average."""
    if len(times) > 1:
        interval = (times[-1] - times[0]) / (len(times) - 1)
        if interval <= 0:
            raise NoFrameTimesError("all frames have the same presentation time")
        return times[-1] + interval
    if not times:
        raise DecodeError("no frame could be decoded")
    return times[-1] + 1 / (info.fps or DEFAULT_FPS)


def _still_reason(frames: int, end_s: float) -> str:
    shown = "it holds one frame" if frames == 1 else f"its {frames} frames show one picture"
    return f"nothing moves in its {end_s:.2f} s: {shown}; decode.still=true takes such videos too"


def _check_whole(info: VideoInfo, frames: int, end_s: float) -> None:
    """Refuse a video that ends well before its header says, in frames and in seconds.

    One of the two alone proves nothing: an edit list hides frames, and a still ending is one long
    frame.
    """
    if not info.frames or info.duration_s is None:
        return
    missing = info.frames - frames
    frame_s = info.duration_s / info.frames
    allowed = max(MISSING_FRAMES, MISSING_SHARE * info.frames)
    if missing > allowed and info.duration_s - end_s > allowed * frame_s:
        raise TruncatedVideoError(
            f"the header promises {info.frames} frames ({info.duration_s:.2f} s) but only {frames} "
            f"({end_s:.2f} s) can be decoded"
        )
