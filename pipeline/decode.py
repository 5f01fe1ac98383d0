"""Two ways into a video: `scan` decodes all of it once, `sample_frames` a few frames of it.

Times are presentation times in seconds from the start of the video stream, never frame numbers
divided by a nominal rate. Frames are RGB, upright (the container's rotation is applied here, once)
and with square pixels.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.child import shared_child
from pipeline.storage import is_local_file, open_video

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

# decord keeps what it decoded since the last seek for as long as its reader is open, so a reader
# serves only a few frames; and it reads the whole file when it opens it.
FRAMES_PER_READER = 16
DECORD_FRAMES = 5000
"""Length of the longest video that decord is asked for."""
READ_ON_S = 2.0
"""As far ahead it is quicker to decode on than to start from a keyframe again."""
MPEG_STREAMS = ("mpegts", "mpeg")


class DecodeError(ValueError):
    """A video cannot be decoded, or not as far as asked."""


@dataclass(frozen=True)
class VideoInfo:
    """What a container says about its first video stream."""

    codec: str
    """Codec name."""
    width: int
    """Columns as displayed: upright and with square pixels."""
    height: int
    """Rows as displayed."""
    fps: float
    """Average frames per second; 0 where the container does not say."""
    frames: int
    """Frames that the container promises; 0 where it does not say."""
    duration_s: float | None
    """Seconds of the video stream, where the container says."""


def probe(uri: str) -> VideoInfo:
    """Read the header of the video at `uri`, and its first frame for the rotation.

    Raises:
        DecodeError: if there is no video stream or no frame in it.
    """
    with open_stream(uri) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise DecodeError("the video stream holds no frame")
        height, width = displayed_size(frame, stream)
        rate = stream.average_rate or stream.guessed_rate
        duration = stream.duration
        return VideoInfo(
            codec=stream.codec_context.name,
            width=width,
            height=height,
            fps=float(rate) if rate else 0.0,
            frames=stream.frames,
            duration_s=None if duration is None else float(duration * stream.time_base),
        )


@contextmanager
def open_stream(uri: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open `uri` (path or `s3://`) and its first video stream.

    Raises:
        DecodeError: if there is none. FFmpeg's own errors pass through.
    """
    import av

    with av.open(open_video(uri)) as container:
        if not container.streams.video:
            raise DecodeError("there is no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield container, stream


def start_time_s(stream: VideoStream) -> float:
    """Presentation time of a stream's start in the container's clock, seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def frame_time_s(frame: av.VideoFrame, stream: VideoStream) -> float:
    """Presentation time of `frame` from the stream's start, seconds."""
    if frame.pts is None:
        raise DecodeError("a frame has no presentation time")
    return float(frame.pts * frame.time_base) - start_time_s(stream)


def tolerance_s(stream: VideoStream) -> float:
    """How far a time may fall short of a frame's and still show it: half a clock tick.

    Containers round presentation times to their clock (1 ms in Matroska), so a frame may be
    stamped a little later than the exact time that asks for it.
    """
    return min(0.5 * float(stream.time_base), 1e-3) + 1e-6


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that put `frame` upright."""
    return round(frame.rotation / 90) % 4


def displayed_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Rows and columns of `frame` as displayed: upright and with square pixels."""
    ratio = stream.sample_aspect_ratio or 1
    height, width = frame.height, max(1, round(frame.width * ratio))
    return (width, height) if quarter_turns(frame) % 2 else (height, width)


def to_rgb(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Upright RGB picture `uint8 [height, width, 3]` of `frame`, scaled by area."""
    turns = quarter_turns(frame)
    stored = (width, height) if turns % 2 else (height, width)
    picture = frame.reformat(
        width=stored[1], height=stored[0], format="rgb24", interpolation="AREA", threads=1
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


class Thumbnails:
    """Scales the frames of one stream down, upright and with square pixels."""

    def __init__(self, stream: VideoStream, height: int) -> None:
        """Args: `stream`, and the rows of the pictures; a video with fewer is not enlarged."""
        from av.video.reformatter import VideoReformatter

        self.stream = stream
        self.height = height
        self.reformatter = VideoReformatter()
        self.size: tuple[int, int] | None = None

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB `uint8 [h, w, 3]` of `frame`; all pictures have the size of the first."""
        import cv2

        if self.size is None:
            rows, columns = displayed_size(frame, self.stream)
            shown = min(rows, self.height)
            self.size = shown, max(1, round(columns * shown / rows))
        turns = quarter_turns(frame)
        height, width = self.size[::-1] if turns % 2 else self.size
        # FFmpeg scales to BGR in 0.6 of the time that it takes to RGB.
        scaled = self.reformatter.reformat(
            frame, width=width, height=height, format="bgr24", interpolation="AREA", threads=1
        )
        picture = cv2.cvtColor(scaled.to_ndarray(), cv2.COLOR_BGR2RGB)
        return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def scan(uri: str, height: int, fps: float | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Decode a whole video at low resolution, in presentation order.

    Args:
        uri: path or `s3://` object.
        height: rows of the pictures; a video with fewer is not enlarged.
        fps: yield at most this many frames per second; none yields all.

    Yields:
        `(time_s, picture)`: presentation time from the stream's start, and RGB `uint8 [h, w, 3]`.

    Raises:
        DecodeError: if a frame has no presentation time, or there is no video.
    """
    with open_stream(uri) as (container, stream):
        thumbnails = Thumbnails(stream, height)
        next_time = float("-inf")
        for frame in container.decode(stream):
            time_s = frame_time_s(frame, stream)
            if time_s + tolerance_s(stream) < next_time:
                continue
            if fps:
                next_time = (time_s if next_time == float("-inf") else next_time) + 1 / fps
            yield time_s, thumbnails.picture(frame)


def sample_frames(
    uri: str,
    times: Sequence[float],
    height: int | None = None,
    deadline_s: float = 900.0,
    threads: int = 1,
) -> list[np.ndarray]:
    """Pictures shown at `times` (seconds from the stream's start), decoded sparsely.

    decord reads them in a child process; where decord is not installed, cannot open the video, or
    the video is long or no file of its own, PyAV seeks to them. Times in rising order are quickest.

    Args:
        uri: path or `s3://` object.
        times: seconds, in any order.
        height: rows of the pictures, at most the video's own; none keeps the video's size.
        deadline_s: seconds after which the decoder is killed.
        threads: CPU threads of the child.

    Returns:
        RGB pictures `uint8 [h, w, 3]`, one per time.

    Raises:
        pipeline.child.ChildError: if the video cannot be decoded, its decoder crashes, or the
            deadline passes.
    """
    child = shared_child(threads)
    return child.call(read_sparse, uri, list(times), height, deadline_s=deadline_s)


def read_sparse(uri: str, times: list[float], height: int | None) -> list[np.ndarray]:
    """`sample_frames` in this process."""
    try:
        import decord
    except ImportError:
        return read_sparse_pyav(uri, times, height)
    if not is_local_file(uri) or not suits_decord(uri):
        return read_sparse_pyav(uri, times, height)
    try:
        return read_sparse_decord(uri, times, height)
    except (decord.DECORDError, RuntimeError):
        # decord carries an older FFmpeg, which lacks some codecs and pixel formats, and it fails on
        # videos that are rotated by a quarter turn.
        return read_sparse_pyav(uri, times, height)


def suits_decord(uri: str) -> bool:
    """Whether decord shows the video at `uri` as it is, and soon.

    In MPEG streams it seeks to a keyframe too late, and it leaves oblong pixels oblong.
    """
    with open_stream(uri) as (container, stream):
        is_square = (stream.sample_aspect_ratio or 1) == 1
        is_right = is_square and container.format.name not in MPEG_STREAMS
        return is_right and expected_frames(container, stream) <= DECORD_FRAMES


def expected_frames(container: InputContainer, stream: VideoStream) -> float:
    """Frames that a container promises, by its count or its duration; 0 where it tells neither."""
    import av

    if stream.frames:
        return stream.frames
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if stream.duration is not None:
        return float(stream.duration * stream.time_base) * rate
    return (container.duration or 0) / av.time_base * rate


def read_sparse_decord(uri: str, times: list[float], height: int | None) -> list[np.ndarray]:
    """Sparse frames through decord: open, read a few, close."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    pictures: list[np.ndarray] = []
    for first in range(0, len(times), FRAMES_PER_READER):
        reader = decord.VideoReader(uri, num_threads=1)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        starts = (starts - starts[0]).tolist()
        wanted = [shown_at(starts, t) for t in times[first : first + FRAMES_PER_READER]]
        pictures.extend(shrink(p, height) for p in reader.get_batch(wanted).asnumpy())
        del reader
    return pictures


def read_sparse_pyav(uri: str, times: list[float], height: int | None) -> list[np.ndarray]:
    """Sparse frames through PyAV: seek to the keyframe before a time and decode up to it."""
    pictures = []
    with open_stream(uri) as (container, stream):
        screen = Screen(container, stream)
        for time_s in times:
            frame = screen.frame_at(time_s)
            pictures.append(shrink(to_rgb(frame, *displayed_size(frame, stream)), height))
    return pictures


def shown_at(starts: Sequence[float], time_s: float) -> int:
    """Index of the frame on screen at `time_s`, given when each frame appears (ascending)."""
    return max(0, bisect.bisect_right(starts, time_s + 1e-3) - 1)


class Screen:
    """What a video shows at given times; from one to a time soon after, it just decodes on."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container = container
        self.stream = stream
        self._spans: Iterator[tuple[av.VideoFrame, float]] = iter(())
        self._shown: av.VideoFrame | None = None
        self._until_s = 0.0

    def frame_at(self, time_s: float) -> av.VideoFrame:
        """The frame on screen at `time_s`; the last one after the end.

        Raises:
            DecodeError: if there is no frame.
        """
        if not self._is_near(time_s):
            self._spans = shown_spans(self.container, self.stream, time_s)
            self._shown = None
        while self._shown is None or self._until_s - tolerance_s(self.stream) <= time_s:
            following = next(self._spans, None)
            if following is None:
                break
            self._shown, self._until_s = following
        if self._shown is None:
            raise DecodeError("the video stream holds no frame")
        return self._shown

    def _is_near(self, time_s: float) -> bool:
        """Whether the frame on screen, or one soon after, is the one at `time_s`."""
        if self._shown is None:
            return False
        from_s = frame_time_s(self._shown, self.stream) - tolerance_s(self.stream)
        return from_s <= time_s <= self._until_s + READ_ON_S


def shown_spans(
    container: InputContainer, stream: VideoStream, time_s: float
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames from the keyframe before `time_s` on, each with the time at which it is replaced.

    The last one stays for the duration that the container gives it, or else for as long as the
    one before.
    """
    shown: av.VideoFrame | None = None
    interval_s = 0.0
    for frame in frames_from(container, stream, time_s):
        if shown is not None:
            until_s = frame_time_s(frame, stream)
            interval_s = until_s - frame_time_s(shown, stream)
            yield shown, until_s
        shown = frame
    if shown is not None:
        last_s = float((shown.duration or 0) * shown.time_base) or interval_s
        yield shown, frame_time_s(shown, stream) + last_s


def frames_from(
    container: InputContainer, stream: VideoStream, time_s: float
) -> Iterator[av.VideoFrame]:
    """Decode in presentation order from a keyframe at or before `time_s`.

    Seeking follows decoding times in some containers and may land on a keyframe that is shown
    only after `time_s`; then it is repeated from further back, at last from the beginning.
    """
    limit = time_s + tolerance_s(stream)
    for back_s in (0.0, 2.0, 10.0, None):
        from_start = back_s is None or time_s - back_s <= 0
        target = start_of_seeks_s(container) if from_start else time_s - (back_s or 0.0)
        ticks = round((target + start_time_s(stream)) / stream.time_base)
        container.seek(ticks, stream=stream, backward=True)
        frames = container.decode(stream)
        # What comes before the keyframe refers to pictures that the seek skipped.
        first = next((frame for frame in frames if from_start or frame.key_frame), None)
        if first is None and from_start:
            return
        if first is not None and (from_start or frame_time_s(first, stream) <= limit):
            yield first
            yield from frames
            return


def start_of_seeks_s(container: InputContainer) -> float:
    """Where to seek for the first frame, seconds from the stream's start.

    MPEG streams are searched by decoding times, which come before presentation times; some other
    containers refuse a time before their start.
    """
    return -1.0 if container.format.name in MPEG_STREAMS else 0.0


def shrink(picture: np.ndarray, height: int | None) -> np.ndarray:
    """Scale `uint8 [h, w, 3]` down by area to `height` rows; smaller pictures stay."""
    import cv2

    rows, columns = picture.shape[:2]
    if height is None or rows <= height:
        return picture
    size = (max(1, round(columns * height / rows)), height)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
