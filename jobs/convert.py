"""`streamdit convert`: an open Wan text-to-video model as a model directory to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.console import progress, say
from streamdit.config import StreamDiTConfig
from streamdit.errors import UserError
from streamdit.io import AUTOENCODER_FOLDER

Precision = Literal["stored", "bfloat16", "float32"]


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Directory or hub id of a diffusers pipeline, such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Model directory to write.")],
    frames: Annotated[
        int, typer.Option("--frames", help="Video frames of a buffer, 1 + 4k; 61 is 16 latents.")
    ] = 61,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="HxW", help="Video size; default: that of its training."),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window",
            metavar="FxHxW",
            help="Attention window in tokens; default: full attention, as it was trained.",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option("--fps", help="Frames per second; default: those of its training."),
    ] = None,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the weights that are written.")
    ] = "stored",
) -> None:
    """Convert a Wan text-to-video model, to train a streaming model from it.

    Wan 2.1 T2V (1.3B and 14B) and Wan 2.2 TI2V-5B give the same velocities here as in diffusers.
    Memory holds one tensor at a time. The text encoder is not copied: its directory or hub id is
    noted down.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another --out, or remove it first")
    import torch

    from streamdit.convert import VideoShape, convert

    height, width = _numbers("--size", size, 2) or (None, None)
    cut = _numbers("--window", window, 3)
    shape = VideoShape(frames, height, width, cut and (cut[0], cut[1], cut[2]), fps)
    dtype = None if precision == "stored" else getattr(torch, precision)
    with progress("convert", "tensors") as on_progress:
        config = convert(
            source, out, shape, dtype, lambda done, total: on_progress(done, total, {})
        )
    _say_what_next(out, config, frames)


def _say_what_next(out: Path, config: StreamDiTConfig, frames: int) -> None:
    """What was written, and the commands that train it to stream."""
    bucket, factor = config.model.buckets[0], config.autoencoder.spatial_factor
    height, width = bucket.height * factor, bucket.width * factor
    say(
        f"wrote {out}: {frames} frames of {height}×{width}, {bucket.frames} latents, "
        f"windows of {'×'.join(map(str, bucket.window))} tokens"
    )
    copied = out / AUTOENCODER_FOLDER
    autoencoder = copied if copied.is_dir() else config.autoencoder.source
    clip = bucket.frames * config.autoencoder.temporal_factor
    encoder = config.text_encoders[0]
    fields = ("name", "kind", "source", "width", "max_tokens")
    text = ", ".join(f"{name}: {getattr(encoder, name)}" for name in fields)
    say("it makes ordinary clips until it is trained to stream, on data with its own encoders:")
    say(
        f"  streamdit ingest VIDEOS --out DATA --autoencoder {autoencoder} clip.frames={clip} "
        f"clip.fps={config.fps:g} clip.height={height} clip.width={width} "
        f"'text_encoders=[{{{text}}}]'"
    )
    say(f"  streamdit train DATA --from {out} --out RUN")


def _numbers(option: str, text: str | None, count: int) -> tuple[int, ...] | None:
    """`480x832` as numbers.

    Raises:
        UserError: if there are not `count` of them.
    """
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != count or not all(part.isdigit() and int(part) > 0 for part in parts):
        example = {2: "480x832", 3: "8x15x26"}[count]
        raise UserError(f"{option} {text!r} is not {count} numbers; write it like {example}")
    return tuple(map(int, parts))


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
