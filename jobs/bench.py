"""`streamdit bench`: how fast a model streams here, with each optimisation added in turn."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from jobs import bench_sprites
from jobs.bench_facts import decoding_facts, decoding_of, headlines, stream_facts, training_facts
from jobs.bench_rows import ROUNDS, SECONDS, Effort, Measured, Save
from jobs.bench_steps import measure_steps
from jobs.bench_streams import measure_decoding, measure_streams
from jobs.bench_subject import (
    load_decoding,
    load_subject,
    preset_decoding,
    random_subject,
)
from jobs.bench_table import bench_table
from jobs.config import load_config
from jobs.console import say
from jobs.errors import JobCommand
from jobs.options import Overrides
from streamdit.devices import choose_device
from streamdit.errors import UserError
from streamdit.files import replace_text
from streamdit.loading import StreamingModel

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
    typer.Option(
        "--autoencoder",
        metavar="NAME|DIR",
        help="Autoencoder preset or `wan`, with random weights, or the directory of a trained one.",
    ),
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
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        min=0.0,
        metavar="SECONDS",
        help="No further round begins after this time.",
        show_default=f"{SECONDS:g}, or none with --rounds",
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
Autotune = Annotated[
    bool,
    typer.Option(
        "--autotune",
        help="Add compiled steps whose kernels are tuned, which takes long for a large model.",
    ),
]
CompiledDecoder = Annotated[
    bool | None,
    typer.Option(
        "--compile-decoder/--no-compile-decoder",
        help="Of these, the compiled decoder; default: as --compile.",
    ),
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
    seconds: Seconds = None,
    sustained: Sustained = None,
    compiled: WithCompile = None,
    autotune: Autotune = False,
    json_file: JsonFile = None,
) -> None:
    """Time a denoising step of a running stream.

    A preset streams as after distillation (one step per chunk, no guidance); a model directory
    as its configuration says.
    """
    subject = _subject(preset, model, device, dtype, None, text_tokens)
    facts = stream_facts(subject, preset, model)
    effort = _effort(subject.device, rounds, sustained, compiled, seconds, autotune=autotune)

    def save(measured: Measured) -> None:
        _keep(_figures("step", facts, measured), json_file)

    _write(_report("step", facts, measure_steps(subject, effort, save)), json_file)


@command.command("decode", cls=JobCommand)
def decode(
    preset: Preset = "demo",
    model: Model = None,
    device: DeviceName = None,
    autoencoder: AutoencoderName = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    compiled: WithCompile = None,
    compiled_decoder: CompiledDecoder = None,
    json_file: JsonFile = None,
) -> None:
    """Time the decoding of a chunk; the transformer is not loaded."""
    chosen = choose_device(device)
    if model is not None:
        subject = load_decoding(model, chosen)
    else:
        subject = preset_decoding(preset, autoencoder, chosen)
    facts = decoding_facts(subject, preset, model)
    effort = _effort(chosen, rounds, 0.0, compiled, seconds, compiled_decoder)
    _write(_report("decode", facts, measure_decoding(subject, effort)), json_file)


@command.command("stream", cls=JobCommand)
def stream(
    preset: Preset = "demo",
    model: Model = None,
    device: DeviceName = None,
    dtype: Precision = None,
    autoencoder: AutoencoderName = None,
    text_tokens: TextTokens = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    sustained: Sustained = None,
    compiled: WithCompile = None,
    compiled_decoder: CompiledDecoder = None,
    autotune: Autotune = False,
    json_file: JsonFile = None,
) -> None:
    """Time whole chunks: denoising, decoding and the way to the host."""
    subject = _subject(preset, model, device, dtype, autoencoder, text_tokens)
    facts = stream_facts(subject, preset, model)
    effort = _effort(
        subject.device, rounds, sustained, compiled, seconds, compiled_decoder, autotune
    )

    def save(measured: Measured) -> None:
        _keep(_figures("stream", facts, measured), json_file)

    _write(_report("stream", facts, measure_streams(subject, effort, save=save)), json_file)


@command.command("all", cls=JobCommand)
def everything(
    preset: Preset = "demo",
    model: Model = None,
    device: DeviceName = None,
    dtype: Precision = None,
    autoencoder: AutoencoderName = None,
    text_tokens: TextTokens = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    sustained: Sustained = None,
    compiled: WithCompile = None,
    compiled_decoder: CompiledDecoder = None,
    autotune: Autotune = False,
    json_file: JsonFile = None,
) -> None:
    """Time steps, streams and decoding, one after the other.

    In one process, where blocks are compiled once for steps and streams; the streams run with the
    step that was fastest. The JSON file is written anew after each, and before what runs alone, so
    that what is measured is kept whatever happens next.
    """
    subject = _subject(preset, model, device, dtype, autoencoder, text_tokens)
    facts = stream_facts(subject, preset, model)
    effort = _effort(
        subject.device, rounds, sustained, compiled, seconds, compiled_decoder, autotune
    )
    parts: dict[str, Any] = {}

    def saver(what: str) -> Save:
        return lambda measured: _keep(parts | {what: _figures(what, facts, measured)}, json_file)

    steps = measure_steps(subject, effort, saver("step"))
    parts["step"] = _report("step", facts, steps)
    _write(parts, json_file)
    streams = measure_streams(subject, effort, steps.fastest, saver("stream"))
    parts["stream"] = _report("stream", facts, streams)
    _write(parts, json_file)
    decoding = decoding_of(subject)
    decoded = measure_decoding(decoding, effort)
    parts["decode"] = _report("decode", decoding_facts(decoding, preset, model), decoded)
    _write(parts, json_file)


@command.command("train", cls=JobCommand)
def train(
    overrides: Overrides = None,
    preset: Preset = "demo",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Clips of a step.")] = 1,
    rounds: Rounds = None,
    seconds: Seconds = None,
    compiled: WithCompile = None,
    json_file: JsonFile = None,
) -> None:
    """Time a training step, with none of the blocks recomputed up to all of them.

    It is the trainer's: DeepSpeed on one device, on random latents and the longest texts.
    KEY=VALUE sets what `streamdit train` takes (`zero_stage=2`, `precision=float32`).
    """
    from jobs.bench_train import TrainingSubject, measure_training
    from training.config import TrainConfig

    for text in overrides or ():
        if text.startswith("activation_checkpointing="):
            raise UserError("bench train measures every activation_checkpointing; leave it away")
        if text.startswith("compile_blocks="):
            raise UserError("bench train measures compiled blocks too; give --compile")
    own = [f"global_batch={batch}", "micro_batch=null", "launch.workers=1"]
    config = load_config(
        TrainConfig, stage="train", preset=preset, overrides=[*own, *(overrides or ())]
    )
    if config.accumulation(1)[1] > 1:
        raise UserError("one step is one micro-batch here; leave micro_batch, give --batch")
    if config.zero_stage == 3:
        if compiled:
            raise UserError("--compile needs whole weights; set zero_stage=2, or leave it out")
        compiled = False
    subject = TrainingSubject(config)
    facts = training_facts(config, subject.world.device, preset)
    effort = _effort(subject.world.device, rounds, 0.0, compiled, seconds)
    _write(_report("train", facts, measure_training(subject, effort)), json_file)


def _effort(
    device: torch.device,
    rounds: int | None,
    sustained: float | None,
    compiled: bool | None,
    seconds: float | None,
    compiled_decoder: bool | None = None,
    autotune: bool = False,
) -> Effort:
    cuda = device.type == "cuda"
    alone = (20.0 if cuda else 0.0) if sustained is None else sustained
    compiled = cuda if compiled is None else compiled
    decoder = compiled if compiled_decoder is None else compiled_decoder
    return Effort(rounds, alone, compiled, seconds, decoder, autotune)


def _report(what: str, facts: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """Show a table; returns all that it says."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = WIDTH
    out.print(Text(f"bench {what}: {facts['source']}", style="bold"))
    for line in headlines(facts):
        out.print(Text(line))
    out.print(bench_table(measured.rows))
    if measured.ratios:
        ratios = ", ".join(f"{name} {ratio:.3g}" for name, ratio in measured.ratios.items())
        out.print(Text(f"medians over the rounds: {ratios}"))
    return _figures(what, facts, measured)


def _figures(what: str, facts: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """All that a table says, as plain values."""
    rows = [asdict(row) for row in measured.rows]
    return {"command": what, **facts, "ratios": measured.ratios, "rows": rows}


def _write(content: dict[str, Any], json_file: Path | None) -> None:
    _keep(content, json_file)
    if json_file is not None:
        say(f"figures: {json_file}")


def _keep(content: dict[str, Any], json_file: Path | None) -> None:
    """Write figures that are not all, and say nothing of it."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(json_file, json.dumps(content, indent=2) + "\n")


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
