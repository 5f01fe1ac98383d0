"""Frames as files that people look at: mp4, stills and contact sheets.

Frames are uint8 `[n, H, W, 3]` in RGB everywhere.
"""

from __future__ import annotations

import functools
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont

from streamdit.errors import UserError

PAPER = (255, 255, 255)
INK = (32, 36, 44)
FAINT = (120, 128, 140)


def write_video(path: Path | str, frames: np.ndarray, fps: float, upscale: int = 1) -> Path:
    """Write an H.264 mp4 (yuv420p, crf 18) that every browser plays.

    The file appears under its name only when it is complete. The same frames give the same bytes.

    Args:
        path: name of the mp4.
        frames: uint8 `[n, H, W, 3]` with n ≥ 1; `H · upscale` and `W · upscale` must be even.
        fps: frames per second.
        upscale: whole factor of nearest-neighbour enlargement, so that 64×64 can be watched.

    Returns:
        `path`.

    Raises:
        UserError: if the frames are empty or of odd size.
    """
    path = Path(path)
    frames = enlarge(frames, upscale)
    count, height, width, _ = frames.shape
    if count == 0 or height % 2 or width % 2:
        raise UserError(
            f"{path.name}: {count} frames of {width}×{height} cannot be written as H.264, which "
            "needs at least one frame and even sides; crop, or use an even upscale"
        )
    # The suffix stays .mp4 for the muxer; the leading dot keeps directory listings from seeing it.
    partial = path.with_name(f".{path.stem}.partial.mp4")
    with av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(100_000),
            # Without cpu-independent, x264's decisions differ a little from run to run, and so
            # does the hash of the file, by which a dataset knows its sources.
            options={"crf": "18", "preset": "veryfast", "x264-params": "cpu-independent=1"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        stream.codec_context.colorspace = Colorspace.ITU601
        stream.codec_context.color_range = ColorRange.MPEG
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    os.replace(partial, path)
    return path


def read_video(path: Path | str) -> np.ndarray:
    """All frames of a short video, uint8 `[n, H, W, 3]`.

    Raises:
        UserError: if the file is missing or is not a video.
    """
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise UserError(
            f"{path}: cannot be read as video ({error}); give a file that FFmpeg decodes"
        ) from error
    return np.stack(frames)


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel `factor` times along rows and columns."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else frames


def write_still(path: Path | str, frame: np.ndarray, upscale: int = 1) -> Path:
    """Write one frame, uint8 `[H, W, 3]`, as PNG (the poster of a video)."""
    path = Path(path)
    Image.fromarray(enlarge(frame[None], upscale)[0]).save(path, format="PNG")
    return path


def evenly_spaced(count: int, columns: int) -> list[int]:
    """Indices of `columns` frames of `count`, first and last included, in order."""
    return [int(index) for index in np.linspace(0, count - 1, columns).round()]


def contact_sheet(
    rows: list[tuple[str, np.ndarray]], columns: int = 8, cell_scale: int = 2
) -> Image.Image:
    """Rows of evenly spaced frames, each under its label, on white paper.

    Args:
        rows: pairs of a label and frames uint8 `[n, H, W, 3]`; sizes and lengths may differ.
        columns: frames shown per row (a shorter video shows all it has).
        cell_scale: whole factor of nearest-neighbour enlargement.

    Raises:
        UserError: if there is nothing to show.
    """
    if not rows or columns < 1 or any(len(frames) == 0 for _, frames in rows):
        raise UserError(
            "a contact sheet needs a column and at least one row, each with at least one frame"
        )
    strips = [_strip(frames, columns, cell_scale) for _, frames in rows]
    margin, label_height, row_gap = 24, 26, 16
    width = max(strip.width for strip in strips) + 2 * margin
    height = sum(strip.height + label_height + row_gap for strip in strips) + 2 * margin - row_gap
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = margin
    for (label, frames), strip in zip(rows, strips, strict=True):
        _write_label(draw, label, len(frames), top, margin, width - margin)
        sheet.paste(strip, (margin, top + label_height))
        top += label_height + strip.height + row_gap
    return sheet


def _strip(frames: np.ndarray, columns: int, scale: int, gap: int = 4) -> Image.Image:
    """Evenly spaced frames side by side."""
    picked = enlarge(frames[evenly_spaced(len(frames), min(columns, len(frames)))], scale)
    count, height, width, _ = picked.shape
    strip = Image.new("RGB", (count * (width + gap) - gap, height), PAPER)
    for column, pixels in enumerate(picked):
        strip.paste(Image.fromarray(pixels), (column * (width + gap), 0))
    return strip


def _write_label(
    draw: ImageDraw.ImageDraw, label: str, frames: int, top: int, left: int, right: int
) -> None:
    """Label at the left, number of frames at the right; a long label ends in an ellipsis."""
    count = f"{frames} frames"
    small, font = _font(12), _font(15)
    count_width = draw.textlength(count, font=small)
    text = label
    while text and draw.textlength(text, font=font) > right - left - count_width - 16:
        label = label[:-1]
        text = f"{label.rstrip()}…" if label else ""
    draw.text((left, top + 16), text, fill=INK, font=font, anchor="ls")
    draw.text((right, top + 16), count, fill=FAINT, font=small, anchor="rs")


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, from the copy that matplotlib carries."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)
