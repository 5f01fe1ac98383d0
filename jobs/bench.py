"""`streamdit bench`: how fast a model streams here, with each optimisation added in turn."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from jobs import bench_sprites
from jobs.bench_rows import (
    ROUNDS,
    SECONDS,
    Effort,
    Measured,
    measure_decoding,
    measure_steps,
    measure_streams,
)
from jobs.bench_subject import (
    DecodingSubject,
    load_decoding,
    load_subject,
    most_text_tokens,
    random_decoding,
    random_subject,
)
from jobs.bench_table import bench_table
from jobs.config import load_config
from jobs.console import format_parameters, say
from jobs.errors import JobCommand
from jobs.model_facts import count_parameters
from jobs.options import Overrides
from streamdit.autoencoder.io import read_record
from streamdit.devices import choose_device
from streamdit.errors import UserError
from streamdit.io import AUTOENCODER_FOLDER
from streamdit.loading import StreamingModel

if TYPE_CHECKING:
    from training.config import TrainConfig

command = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

WIDTH = 110
"""Columns of the table where it is not written to a terminal."""

Preset = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="Training preset, with random weights.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Model directory, instead of a preset."),
]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: cuda if there.")
]
Precision = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16; default: bfloat16 on CUDA, else float32."),
]
AutoencoderName = Annotated[
    str | None,
    typer.Option("--autoencoder", metavar="NAME", help="Autoencoder preset, or `wan`."),
]
TextTokens = Annotated[
    int | None,
    typer.Option(
        "--text-tokens",
        min=2,
        help="Tokens of a prompt, per text encoder; default: the most that each encoder gives.",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        min=1,
        help="Timed rounds; each runs every variant once.",
        show_default=f"{ROUNDS}, or what fits in {SECONDS:g} s",
    ),
]
Sustained = Annotated[
    float | None,
    typer.Option(
        "--sustained",
        min=0.0,
        metavar="SECONDS",
        help="How long the fastest variant runs alone at the end.",
        show_default="20 on CUDA, else 0",
    ),
]
WithCompile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Add compiled variants; default: on CUDA."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write every figure as JSON.")
]


@command.callback()
def _overview() -> None:
    """Measure how fast a model streams, and (`sprites`) what distillation keeps.

    Every line of a table of speed adds one optimisation to the line above. The variants take turns
    within one run, so that their ratios hold on a busy machine too.
    """


@command.command("step", cls=JobCommand)
def step(
    preset: Preset = "demo",
    model: Model = None,
    device: DeviceName = None,
    dtype: Precision = None,
    text_tokens: TextTokens = None,
    rounds: Rounds = None,
    sustained: Sustained = None,
    compiled: WithCompile = None,
    json_file: JsonFile = None,
) -> None:
    """Time a denoising step of a running stream.

    A preset streams as after distillation (one step per chunk, no guidance); a model directory
    as its configuration says.
    """
    subject = _subject(preset, model, device, dtype, None, text_tokens)
    measured = measure_steps(subject, _effort(subject.device, rounds, sustained, compiled))
    _report("step", _stream_facts(subject, preset, model), measured, json_file)


@command.command("decode", cls=JobCommand)
def decode(
    preset: Preset = "demo",
    model: Model = None,
    device: DeviceName = None,
    autoencoder: AutoencoderName = None,
    rounds: Rounds = None,
    compiled: WithCompile = None,
    json_file: JsonFile = None,
) -> None:
    """Time the decoding of a chunk; the transformer is not loaded."""
    chosen = choose_device(device)
    if model is not None:
        subject = load_decoding(model, chosen)
    else:
        subject = random_decoding(preset, autoencoder, chosen)
    measured = measure_decoding(subject, _effort(chosen, rounds, 0.0, compiled))
    _report("decode", _decoding_facts(subject, preset, model), measured, json_file)


@command.command("stream", cls=JobCommand)
def stream(
    preset: Preset = "demo",
    model: Model = None,
    device: DeviceName = None,
    dtype: Precision = None,
    autoencoder: AutoencoderName = None,
    text_tokens: TextTokens = None,
    rounds: Rounds = None,
    sustained: Sustained = None,
    compiled: WithCompile = None,
    json_file: JsonFile = None,
) -> None:
    """Time whole chunks: denoising, decoding and the way to the host."""
    subject = _subject(preset, model, device, dtype, autoencoder, text_tokens)
    measured = measure_streams(subject, _effort(subject.device, rounds, sustained, compiled))
    _report("stream", _stream_facts(subject, preset, model), measured, json_file)


@command.command("train", cls=JobCommand)
def train(
    overrides: Overrides = None,
    preset: Preset = "demo",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Clips of a step.")] = 1,
    rounds: Rounds = None,
    json_file: JsonFile = None,
) -> None:
    """Time a training step, with none of the blocks recomputed up to all of them.

    It is the trainer's: DeepSpeed on one device, on random latents and the longest texts.
    KEY=VALUE sets what `streamdit train` takes (`zero_stage=2`, `precision=float32`).
    """
    from jobs.bench_train import TrainingSubject, measure_training
    from training.config import TrainConfig

    if any(text.startswith("activation_checkpointing=") for text in overrides or ()):
        raise UserError("bench train measures every activation_checkpointing; leave it away")
    own = [f"global_batch={batch}", "micro_batch=null", "launch.workers=1"]
    config = load_config(
        TrainConfig, stage="train", preset=preset, overrides=[*own, *(overrides or ())]
    )
    if config.accumulation(1)[1] > 1:
        raise UserError("one step is one micro-batch here; leave micro_batch, give --batch")
    subject = TrainingSubject(config)
    measured = measure_training(subject, _effort(subject.world.device, rounds, 0.0, False))
    _report("train", _training_facts(config, subject.world.device, preset), measured, json_file)


def _training_facts(config: TrainConfig, device: torch.device, preset: str) -> dict[str, Any]:
    """What is trained, how, and where."""
    bucket = config.model.buckets[0]
    return {
        "source": preset,
        "parameters": sum(count_parameters(config.model).values()),
        "dtype": config.precision,
        "latent": [bucket.frames, config.model.latent_channels, bucket.height, bucket.width],
        "batch": config.global_batch,
        "zero_stage": config.zero_stage,
        "text_tokens": sum(most_text_tokens(name) for name in config.model.text),
        **_place(device),
    }


def _effort(
    device: torch.device, rounds: int | None, sustained: float | None, compiled: bool | None
) -> Effort:
    cuda = device.type == "cuda"
    seconds = (20.0 if cuda else 0.0) if sustained is None else sustained
    return Effort(rounds, seconds, cuda if compiled is None else compiled)


def _report(what: str, facts: dict[str, Any], measured: Measured, json_file: Path | None) -> None:
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = WIDTH
    out.print(Text(f"bench {what}: {facts['source']}", style="bold"))
    for line in _headlines(facts):
        out.print(Text(line))
    out.print(bench_table(measured.rows))
    if measured.ratios:
        ratios = ", ".join(f"{name} {ratio:.3g}" for name, ratio in measured.ratios.items())
        out.print(Text(f"medians over the rounds: {ratios}"))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) for row in measured.rows]
        content = {"command": what, **facts, "ratios": measured.ratios, "rows": rows}
        json_file.write_text(json.dumps(content, indent=2) + "\n")
        say(f"figures: {json_file}")


def _decoding_facts(subject: DecodingSubject, preset: str, model: str | None) -> dict[str, Any]:
    """What is decoded, by what, and where."""
    identity, device = subject.autoencoder.identity, subject.device
    _, height, width = subject.latent_shape
    return {
        "source": model or preset,
        "height": height * identity.spatial_factor,
        "width": width * identity.spatial_factor,
        "frames_per_chunk": subject.autoencoder.frames_for(subject.chunk_frames, first=False),
        "autoencoder": identity.kind,
        "autoencoder_parameters": sum(p.numel() for p in subject.autoencoder.parameters()),
        "autoencoder_trained": model is not None,
        "autoencoder_psnr": None if model is None else _psnr(model),
        **_place(device),
    }


def _place(device: torch.device) -> dict[str, Any]:
    """Where it runs."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _stream_facts(subject: StreamingModel, preset: str, model: str | None) -> dict[str, Any]:
    """The same, and what denoises."""
    scheme = subject.scheme()
    decoding = DecodingSubject(subject.autoencoder, subject.latent_shape, scheme.c, subject.device)
    return {
        **_decoding_facts(decoding, preset, model),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": str(subject.model.patch_embedding.weight.dtype).removeprefix("torch."),
        "scheme": {**vars(scheme), "guidance_scale": subject.config.sampling.guidance_scale},
        "text_tokens": subject.max_text_tokens,
    }


def _psnr(directory: str) -> float | None:
    """Decibels that the autoencoder of a model directory reached on clips kept from training."""
    record = read_record(Path(directory) / AUTOENCODER_FOLDER)
    if record is None or record.training.get("psnr_split") != "held_out":
        return None
    return float(record.training["psnr"])


def _headlines(facts: dict[str, Any]) -> list[str]:
    device = facts["device"]
    if device == "CPU":
        threads = facts["threads"]
        device = f"{threads} thread{'' if threads == 1 else 's'} of a CPU ({facts['machine']})"
    lines = [f"device      {device}, PyTorch {facts['torch']}"]
    if "batch" in facts:
        shape = "×".join(map(str, facts["latent"]))
        training = f"batch of {facts['batch']}, ZeRO {facts['zero_stage']}, AdamW"
        lines.insert(0, f"step        latents {shape}, {training}")
    else:
        decoder = f"{format_parameters(facts['autoencoder_parameters'])} parameters"
        autoencoder = f"{facts['autoencoder']}, {decoder}, {_quality(facts)}"
        lines = [_video_line(facts), f"autoencoder {autoencoder}", *lines]
    if "parameters" in facts:
        lines.insert(
            0,
            f"model       {format_parameters(facts['parameters'])} parameters in {facts['dtype']}; "
            f"{facts['text_tokens']} text tokens",
        )
    return lines


def _video_line(facts: dict[str, Any]) -> str:
    size = f"{facts['height']}×{facts['width']}, {facts['frames_per_chunk']} frames a chunk"
    if (scheme := facts.get("scheme")) is None:
        return f"video       {size}"
    guidance = scheme["guidance_scale"]
    steering = "no guidance" if guidance == 1.0 else f"guidance {guidance:g}"
    parts = " ".join(f"{name}={scheme[name]}" for name in ("K", "N", "c", "s"))
    return f"video       {size}; {parts}, {steering}"


def _quality(facts: dict[str, Any]) -> str:
    """How well the decoder does its work, which its speed must be seen beside."""
    if facts["autoencoder_psnr"] is not None:
        return f"PSNR {facts['autoencoder_psnr']:.1f} dB"
    if facts["autoencoder_trained"]:
        return "PSNR on held-out clips not recorded"
    return "random weights, so no PSNR (give --model for one)"


def _subject(
    preset: str,
    model: str | None,
    device: str | None,
    dtype: str | None,
    autoencoder: str | None,
    text_tokens: int | None,
) -> StreamingModel:
    chosen = choose_device(device)
    precisions = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    name = dtype or ("bfloat16" if chosen.type == "cuda" else "float32")
    if name not in precisions:
        raise UserError(f"--dtype {name} is unknown; choose float32 or bfloat16")
    if model is None:
        return random_subject(preset, autoencoder, text_tokens, chosen, precisions[name])
    if text_tokens is not None:
        raise UserError(
            "--text-tokens is for presets, but a trained model has its own text encoders; leave "
            "it out"
        )
    return load_subject(model, chosen, precisions[name])


command.command("sprites", cls=JobCommand)(bench_sprites.command)


if __name__ == "__main__":
    command()
