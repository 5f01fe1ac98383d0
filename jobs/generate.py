"""`streamdit generate`: stream video from a model into a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import streamdit
from evaluation.sheets import contact_sheet, write_video
from jobs.console import progress, say
from streamdit.config import SamplingConfig
from streamdit.errors import UserError
from streamdit.io import StreamingModel
from streamdit.stream import StreamChunk
from training.config import TrackingConfig
from training.tracking import use_store


@dataclass(frozen=True)
class PromptChange:
    """A prompt, and the first frame that it is in force for."""

    frame: int
    prompt: str


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model directory, or models:/NAME@ALIAS in MLflow."),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            help="What to show. Repeat with `FRAME:PROMPT` to change it on the way, as in "
            '--prompt "a red circle" --prompt "64:a blue square".',
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.mp4", help="Video to write.")] = Path(
        "stream.mp4"
    ),
    frames: Annotated[int, typer.Option("--frames", min=1, help="Video frames.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    chunk_frames: Annotated[
        int | None, typer.Option("--chunk-frames", min=1, help="Latent frames per chunk, c.")
    ] = None,
    micro_steps: Annotated[
        int | None, typer.Option("--micro-steps", min=1, help="Denoising steps per chunk, s.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", min=0.0, help="Classifier-free guidance weight, w."),
    ] = None,
    upscale: Annotated[
        int, typer.Option("--upscale", min=1, help="Repeat every pixel this often per axis.")
    ] = 1,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: cuda if there.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE.png", help="Contact sheet to write.")
    ] = None,
) -> None:
    """Stream video from a model, with prompt changes on the way, and write it as mp4."""
    changes = [parse_prompt(text, first=index == 0) for index, text in enumerate(prompt)]
    for path in filter(None, (out, sheet)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if model.startswith("models:/"):
        use_store(TrackingConfig())
    loaded = streamdit.load(model, device=device)
    defaults = loaded.config.sampling
    sampling = SamplingConfig(
        chunk_frames=defaults.chunk_frames if chunk_frames is None else chunk_frames,
        micro_steps=defaults.micro_steps if micro_steps is None else micro_steps,
        reference_frames=defaults.reference_frames,
        guidance_scale=defaults.guidance_scale if guidance is None else guidance,
    )
    chunks = []
    with progress("generate", unit="frames") as on_progress:
        for chunk in stream_frames(loaded, changes, frames, seed, sampling):
            chunks.append(chunk.frames)
            on_progress(min(frames, sum(map(len, chunks))), frames, {})
    video = np.concatenate(chunks)[:frames]
    write_video(out, video, loaded.config.fps, upscale=upscale)
    say(f"video: {out} ({len(video)} frames at {loaded.config.fps:g} FPS)")
    if sheet is not None:
        contact_sheet([(changes[0].prompt, video)], columns=8, cell_scale=2).save(sheet)
        say(f"contact sheet: {sheet}")


def parse_prompt(text: str, first: bool) -> PromptChange:
    """`FRAME:PROMPT`; the first prompt needs no frame.

    Raises:
        UserError: if a later prompt names no frame.
    """
    frame, separator, rest = text.partition(":")
    if separator and frame.strip().isdigit():
        return PromptChange(int(frame), rest.strip())
    if first:
        return PromptChange(0, text)
    raise UserError(
        f"--prompt {text!r} does not say when it begins; write FRAME:PROMPT, as in '64:{text}'"
    )


def stream_frames(
    model: StreamingModel,
    changes: Sequence[PromptChange],
    frames: int,
    seed: int,
    sampling: SamplingConfig | None = None,
) -> Iterator[StreamChunk]:
    """Chunks of a stream until `frames` frames are out; each prompt is set before its frame."""
    pending = sorted(changes, key=lambda change: change.frame)
    stream = model.stream(pending.pop(0).prompt, seed, sampling)
    done = 0
    while done < frames:
        while pending and pending[0].frame <= done:
            stream.prompt = pending.pop(0).prompt
        chunk = next(stream)
        done += len(chunk.frames)
        yield chunk


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
