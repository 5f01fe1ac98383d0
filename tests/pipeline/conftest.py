"""Videos whose frames tell their own number, and the three jobs without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.config import IngestConfig

BITS = 12


def code_picture(number: int, height: int = 48, width: int = 96) -> np.ndarray:
    """A picture with `number` in black and white bars, robust against compression."""
    picture = np.zeros((height, width, 3), np.uint8)
    bar = width // BITS
    for bit in range(BITS):
        picture[:, bit * bar : (bit + 1) * bar] = 235 if number >> bit & 1 else 20
    return picture


def read_code(picture: np.ndarray) -> int:
    """The number in a picture of any size."""
    centres = ((np.arange(BITS) + 0.5) / BITS * picture.shape[1]).astype(int)
    middle = picture[picture.shape[0] // 2, centres].mean(-1)
    return int(sum(1 << bit for bit in range(BITS) if middle[bit] > 127))


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    fps: int | Fraction = 16,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: int = 0,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
) -> Path:
    """Encode RGB pictures; `ticks` of `time_base` give each its presentation time."""
    defaults = {"crf": "12", "preset": "veryfast"} if codec == "libx264" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.options = {**defaults, **(options or {})}
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = time_base or 1 / Fraction(fps)
            frame.pts = i if ticks is None else ticks[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def scene_pictures(
    colour: tuple[int, int, int], frames: int, size: int = 64, step: int = 1
) -> list[np.ndarray]:
    """A white square that moves `step` pixels a frame over a plain background."""
    pictures = []
    for i in range(frames):
        picture = np.full((size, size, 3), colour, np.uint8)
        left = 4 + (i * step) % (size - 20)
        picture[24:36, left : left + 12] = 245
        pictures.append(picture)
    return pictures


COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 40, 200),
    "yellow": (210, 200, 40),
    "purple": (120, 30, 130),
    "cyan": (40, 190, 200),
}


def write_shots(path: Path, colours: Sequence[str], seconds: float = 2.0, step: int = 1) -> Path:
    """Shots of plain colours joined by hard cuts, with a WebVTT caption for each."""
    frames = round(seconds * 16)
    pictures = [p for name in colours for p in scene_pictures(COLOURS[name], frames, step=step)]
    cues = ["WEBVTT\n"]
    for i, name in enumerate(colours):
        start, end = i * seconds, (i + 1) * seconds
        cues.append(f"00:{start:06.3f} --> 00:{end:06.3f}\na square over {name}\n")
    write_video(path, pictures)
    path.with_suffix(".vtt").write_text("\n".join(cues), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors: more threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)


SMALL = {
    "clip": {"frames": 16, "fps": 16, "height": 32, "width": 32, "stride_frames": 16},
    "scenes": {"detector": "content", "min_scene_s": 0.5, "scan_height": 64},
    "captions": {"frames": 2},
    "text_encoders": [{"name": "bytes", "kind": "bytes", "width": 16, "max_tokens": 48}],
    "selection": {"held_out_share": 0.3},
    "unit_sources": 2,
    "workers": 2,
    "encode": {"batch": 4},
    "decode": {"deadline_s": 60.0},
}


@pytest.fixture
def small_config() -> IngestConfig:
    """Clips of one second, 16x32x32, two sources a unit."""
    return IngestConfig.model_validate(SMALL)


@pytest.fixture(scope="session")
def autoencoder_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny causal autoencoder with random weights."""
    import torch

    from streamdit.autoencoder import (
        CausalAutoencoder,
        CausalAutoencoderConfig,
        save_autoencoder,
    )

    torch.manual_seed(0)
    config = CausalAutoencoderConfig(
        latent_channels=4,
        patch=(4, 8, 8),
        widths=(8,),
        strides=(),
        encoder_blocks=(1,),
        decoder_blocks=(1,),
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    save_autoencoder(CausalAutoencoder(config), folder)
    return str(folder)


def run_in_a_loop(
    tasks: Sequence[dict[str, Any]],
    stage: Callable[..., Any] | type,
    *,
    constructor: dict[str, Any] | None = None,
    **resources: Any,
):
    """`run_units` without Ray."""
    call = stage(**(constructor or {})) if tasks and isinstance(stage, type) else stage
    for task in tasks:
        for row in call(task):
            yield json.loads(row["counters"])


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs run their stages one unit after another in this process."""
    for module in ("curate", "annotate", "encode"):
        monkeypatch.setattr(f"pipeline.{module}.run_units", run_in_a_loop)


@pytest.fixture(scope="session")
def ray_runtime():
    """One local Ray for all tests that need it."""
    from pipeline.graph import ensure_ray, stop_ray

    ensure_ray()
    yield
    stop_ray()


def file_hashes(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
