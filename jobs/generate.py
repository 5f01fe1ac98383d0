"""`streamdit generate`: stream video from a model into a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from pydantic import ValidationError
from torch import Tensor

import streamdit
from evaluation.sheets import contact_sheet, write_video
from jobs.console import progress, say
from jobs.sources import read_image, read_source
from streamdit.config import SamplingConfig
from streamdit.decoding import DecoderConfig
from streamdit.errors import UserError
from streamdit.loading import DEFAULT_FAST, StreamingModel
from streamdit.model.fast import FastConfig
from streamdit.start import Guide
from streamdit.stream import StreamChunk
from training.config import TrackingConfig
from training.tracking import use_store

DEFAULT_STRENGTH = 0.6


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
            help="What to show. Repeat with `FRAME:PROMPT` or `SECONDSs:PROMPT` to change it on "
            'the way, as in --prompt "a red circle" --prompt "4s:a blue square".',
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.mp4", help="Video to write.")] = Path(
        "stream.mp4"
    ),
    frames: Annotated[int, typer.Option("--frames", min=1, help="Video frames.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            metavar="c=2,s=1",
            help="Latent frames per chunk c, steps per chunk s, clean reference frames K; what "
            "is left out is the model's own.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", min=0.0, help="Classifier-free guidance weight, w."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="KIND",
            help="How the first buffer is filled: text-to-video or ramp; default: the model's own.",
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="Picture to begin from.")
    ] = None,
    video: Annotated[
        Path | None, typer.Option("--video", metavar="FILE", help="Video to follow and change.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            min=0.0,
            max=1.0,
            help="How far to leave the image or video: 0 gives it back, 1 ignores it.",
            show_default=f"{DEFAULT_STRENGTH}",
        ),
    ] = None,
    extend: Annotated[
        Path | None,
        typer.Option(
            "--extend",
            metavar="FILE",
            help="Video to continue from its last frames; needs a scheme with K > 0. The file "
            "that is written begins behind it.",
        ),
    ] = None,
    upscale: Annotated[
        int, typer.Option("--upscale", min=1, help="Repeat every pixel this often per axis.")
    ] = 1,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: cuda if there.")
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Compile the model first (on CUDA also capture its step as a CUDA graph, and "
            "decode in bfloat16), which takes minutes; for long videos. The video changes by "
            "rounding only.",
        ),
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE.png", help="Contact sheet to write.")
    ] = None,
) -> None:
    """Stream video from a model, with prompt changes on the way, and write it as mp4."""
    for path in filter(None, (out, sheet)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if model.startswith("models:/"):
        use_store(TrackingConfig())
    loaded = streamdit.load(model, device=device)
    changes = [
        parse_prompt(text, loaded.config.fps, first=index == 0) for index, text in enumerate(prompt)
    ]
    sampling = choose_sampling(loaded, scheme, guidance, start)
    guide, history = read_start(loaded, frames, image, video, extend, strength)
    chunks = []
    with progress("generate", unit="frames") as on_progress:
        for chunk in stream_frames(loaded, changes, frames, seed, sampling, guide, history, fast):
            chunks.append(chunk.frames)
            on_progress(min(frames, sum(map(len, chunks))), frames, {})
    played = np.concatenate(chunks)[:frames]
    write_video(out, played, loaded.config.fps, upscale=upscale)
    say(f"video: {out} ({len(played)} frames at {loaded.config.fps:g} FPS)")
    if sheet is not None:
        contact_sheet([(changes[0].prompt, played)], columns=8, cell_scale=2).save(sheet)
        say(f"contact sheet: {sheet}")


def parse_prompt(text: str, fps: float, first: bool) -> PromptChange:
    """`FRAME:PROMPT` or `SECONDSs:PROMPT`; the first prompt needs neither.

    Raises:
        UserError: if a later prompt does not say when it begins.
    """
    when, separator, rest = text.partition(":")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(s?)\s*", when)
    if separator and match and (match[2] or match[1].isdigit()):
        frame = round(float(match[1]) * fps) if match[2] else int(match[1])
        return PromptChange(frame, rest.strip())
    if first:
        return PromptChange(0, text)
    raise UserError(
        f"--prompt {text!r} does not say when it begins; write FRAME:PROMPT or SECONDSs:PROMPT, "
        f"as in '64:{text}' or '4s:{text}'"
    )


def choose_sampling(
    model: StreamingModel, scheme: str | None, guidance: float | None, start: str | None
) -> SamplingConfig:
    """The model's own sampling, with what the command line says instead.

    Raises:
        UserError: if it is none, or the model does not serve it.
    """
    own = model.config.sampling
    values = own.model_dump() | parse_scheme(scheme or "")
    if guidance is not None:
        values["guidance_scale"] = guidance
    if start is not None:
        values["start"] = start
    try:
        sampling = SamplingConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"sampling {key} cannot be used: {reason}; see --help") from None
    model.scheme(sampling)
    return sampling


def parse_scheme(text: str) -> dict[str, int]:
    """`c=2,s=1,K=0` as values of :class:`SamplingConfig`.

    Raises:
        UserError: for anything else.
    """
    names = {"c": "chunk_frames", "s": "micro_steps", "K": "reference_frames"}
    values = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        key, _, number = part.partition("=")
        if key not in names or not number.isdigit():
            raise UserError(
                f"--scheme {text!r}: {part!r} is not one of c=, s=, K= with a whole number; write "
                "it like --scheme c=2,s=1 (the number of chunks N follows from c)"
            )
        values[names[key]] = int(number)
    return values


def read_start(
    model: StreamingModel,
    frames: int,
    image: Path | None,
    video: Path | None,
    extend: Path | None,
    strength: float | None,
) -> tuple[Guide | None, Tensor | None]:
    """What the stream follows, and what it continues.

    Raises:
        UserError: if the options contradict each other, or a file cannot be read.
    """
    if sum(path is not None for path in (image, video, extend)) > 1:
        raise UserError("--image, --video and --extend each say how to begin; give one of them")
    if strength is not None and image is None and video is None:
        raise UserError("--strength needs something to leave; add --image FILE or --video FILE")
    strength = DEFAULT_STRENGTH if strength is None else strength
    buffer = model.config.model.buffer_frames * model.autoencoder.identity.temporal_factor
    if image is not None:
        return model.guide(read_image(image), strength), None
    if video is not None:
        # The last frames are made beside those of a whole buffer behind them.
        return model.guide(read_source(video, model, frames + buffer), strength), None
    if extend is not None:
        return None, model.latents(read_source(extend, model, buffer, from_end=True))
    return None, None


def compiled_stream(device: torch.device) -> tuple[FastConfig, DecoderConfig]:
    """The optimisations that change nothing but rounding and shift no prompt.

    Not every CPU computes in bfloat16 itself, so decoders keep float32 there.
    """
    cuda = device.type == "cuda"
    steps = FastConfig(compile=True, cuda_graph=cuda, attention="cudnn" if cuda else "auto")
    decoder = DecoderConfig(compile=True, bfloat16=cuda, channels_last=cuda, cudnn_autotune=cuda)
    return steps, decoder


def stream_frames(
    model: StreamingModel,
    changes: Sequence[PromptChange],
    frames: int,
    seed: int,
    sampling: SamplingConfig | None = None,
    guide: Guide | None = None,
    history: Tensor | None = None,
    fast: bool = False,
) -> Iterator[StreamChunk]:
    """Chunks of a stream until `frames` frames are out; each prompt is set before its frame."""
    pending = sorted(changes, key=lambda change: change.frame)
    steps, decoder = compiled_stream(model.device) if fast else (DEFAULT_FAST, None)
    first = pending.pop(0).prompt
    stream = model.stream(first, seed, sampling, guide, history, steps, decoder)
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
