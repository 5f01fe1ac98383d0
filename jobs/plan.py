"""`streamdit plan`: what a training project of a given size needs, before anything is started."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from distillation.config import DistillConfig
from jobs.config import available_presets, load_config
from jobs.console import format_bytes, format_flops, format_parameters
from jobs.model_facts import describe, find_subject
from jobs.options import ConfigFile, Overrides
from jobs.sizing import (
    Failures,
    Fleet,
    IngestRates,
    checkpoint_bytes,
    dataset_size,
    distillation_flops,
    gradient_traffic,
    training_flops,
)
from streamdit.errors import UserError
from streamdit.gpus import GPUS, Gpu
from training.config import TrainConfig

TRAINING_STAGES = ("task learning", "generalisation", "quality")
PAPER_GPUS = {"training": 128, "distillation": 64}
"""H100 that the paper used (arXiv:2507.03745v4, Sec. 4.1), for 10K iterations of each stage."""
GPU_MTBF_HOURS = 50_000.0
"""Hours of one GPU between failures: 419 unexpected interruptions of 16,384 H100 in 54 days
(arXiv:2407.21783, Sec. 3.3.4)."""


@dataclass(frozen=True)
class Assumptions:
    """What no formula can know; each is an option, and a measured value is better."""

    mfu: float
    fps: float
    caption_tokens: float
    keep: float
    curate_rate: float
    annotate_rate: float
    encode_rate: float
    ingest_cpus: int
    ingest_gpus: int
    storage: float
    gpu_mtbf_h: float
    restart_s: float


def command(
    overrides: Overrides = None,
    clips: Annotated[
        float, typer.Option("--clips", help="Clips to train on, as in 2.6e6.")
    ] = 2.6e6,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that train.")] = 128,
    gpu: Annotated[str, typer.Option("--gpu", metavar="|".join(GPUS), help="Which GPU.")] = "h100",
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME", help="Training preset.")
    ] = "streamdit-4b",
    config: ConfigFile = None,
    mfu: Annotated[
        float, typer.Option("--mfu", help="Share of the GPU's peak that training reaches.")
    ] = 0.4,
    fps: Annotated[float, typer.Option("--fps", help="Frames per second of clips.")] = 16.0,
    caption_tokens: Annotated[
        float, typer.Option("--caption-tokens", help="Mean tokens of a caption, per encoder.")
    ] = 64.0,
    keep: Annotated[
        float, typer.Option("--keep", help="Share of the video's seconds that clips keep.")
    ] = 0.5,
    curate_rate: Annotated[
        float, typer.Option("--curate-rate", help="Seconds of raw video curated per CPU second.")
    ] = 10.0,
    annotate_rate: Annotated[
        float, typer.Option("--annotate-rate", help="Clips annotated per CPU second.")
    ] = 1.0,
    encode_rate: Annotated[
        float, typer.Option("--encode-rate", help="Clips encoded per GPU second.")
    ] = 1.0,
    ingest_cpus: Annotated[
        int, typer.Option("--ingest-cpus", min=1, help="CPU cores of ingestion.")
    ] = 512,
    ingest_gpus: Annotated[
        int, typer.Option("--ingest-gpus", min=1, help="GPUs that encode.")
    ] = 32,
    storage: Annotated[
        float, typer.Option("--storage", help="GB/s that the shared storage writes.")
    ] = 10.0,
    gpu_mtbf: Annotated[
        float, typer.Option("--gpu-mtbf", help="Hours of one GPU between failures.")
    ] = GPU_MTBF_HOURS,
    restart: Annotated[
        float, typer.Option("--restart", help="Seconds from a failure until training goes on.")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Show what a project needs: sizes, hours, memory, network, storage, and losses by failures.

    Sizes and operations follow from the preset's shapes. What depends on hardware and data is an
    option: its default is an assumption, and a value that you have measured is better. Nothing is
    started or loaded.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu} is not known: choose one of {', '.join(GPUS)}")
    assumed = Assumptions(
        mfu=mfu,
        fps=fps,
        caption_tokens=caption_tokens,
        keep=keep,
        curate_rate=curate_rate,
        annotate_rate=annotate_rate,
        encode_rate=encode_rate,
        ingest_cpus=ingest_cpus,
        ingest_gpus=ingest_gpus,
        storage=storage * 1e9,
        gpu_mtbf_h=gpu_mtbf,
        restart_s=restart,
    )
    for name, value in (*asdict(assumed).items(), ("clips", clips)):
        if value <= 0:
            raise UserError(f"{name} {value:g} is impossible: give a number above 0")
    if keep > 1:
        raise UserError(f"keep {keep:g} is impossible: give a share of at most 1")
    facts = plan(preset, config, overrides or [], clips, gpus, gpu, assumed)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_plan(facts)


def plan(
    preset: str,
    file: Path | None,
    overrides: list[str],
    clips: float,
    gpus: int,
    gpu: str,
    assumed: Assumptions,
) -> dict[str, Any]:
    """All facts as plain data: bytes, seconds, operations, shares.

    Raises:
        UserError: if the preset or the settings do not fit each other or the GPUs.
    """
    train = load_config(TrainConfig, stage="train", preset=preset, file=file, overrides=overrides)
    same = preset if preset in available_presets("distill") else "streamdit-4b"
    distill = load_config(DistillConfig, stage="distill", preset=same)
    micro, _ = train.accumulation(gpus)
    subject = find_subject(preset, file, overrides)
    run = replace(subject.run, world_size=gpus, micro_batch=micro)
    model = describe(replace(subject, run=run), GPUS[gpu])
    parameters = model["parameters"]
    bucket = model["buckets"][0]
    fleet = Fleet(gpus, GPUS[gpu].bf16, assumed.mfu)
    size = dataset_size(clips, train.model, train.model.buckets[0], assumed.caption_tokens, 512e6)
    step = fleet.step_seconds(training_flops(bucket["flops_per_forward"], train.global_batch))
    video_s = clips * bucket["video"][0] / assumed.fps
    rates = IngestRates(assumed.curate_rate, assumed.annotate_rate, assumed.encode_rate)
    return {
        "preset": preset,
        "gpus": gpus,
        "gpu": GPUS[gpu].title,
        "assumed": asdict(assumed),
        "parameters": parameters,
        "forward_flops": bucket["flops_per_forward"],
        "dataset": {
            "clips": clips,
            "video_s": video_s,
            "raw_video_s": video_s / assumed.keep,
            "latent_bytes": clips * size.latent_bytes,
            "text_bytes": clips * size.text_bytes,
            "bytes": size.bytes,
            "shards": size.shards,
        },
        "ingest_s": rates.seconds(
            video_s / assumed.keep, clips, assumed.ingest_cpus, assumed.ingest_gpus
        ),
        "stages": _stages(train, distill, bucket["flops_per_forward"], fleet),
        "memory": _memory(model, GPUS[gpu]),
        "network": _network(parameters, gpus, step),
        "storage_read_rate": train.global_batch / step * size.clip_bytes,
        **_interruptions(train, parameters, gpus, step, assumed),
    }


def _interruptions(
    train: TrainConfig, parameters: int, gpus: int, step: float, assumed: Assumptions
) -> dict[str, Any]:
    """What checkpoints cost, and what failures do."""
    save = checkpoint_bytes(parameters) / assumed.storage
    failures = Failures(assumed.gpu_mtbf_h * 3600 / gpus, save, assumed.restart_s)
    interval = train.checkpoint.every * step
    return {
        "checkpoint": {"bytes": checkpoint_bytes(parameters), "save_s": save},
        "failures": {
            "mtbf_s": failures.mtbf,
            "interval_s": interval,
            "loss": failures.loss(interval),
            "best_interval_s": failures.best_interval,
            "best_interval_steps": max(1, round(failures.best_interval / step)),
            "best_loss": failures.loss(failures.best_interval),
        },
    }


def _stages(
    train: TrainConfig, distill: DistillConfig, forward: float, fleet: Fleet
) -> list[dict[str, Any]]:
    """Steps, time and samples of every stage, here and on as many GPUs as the paper had."""
    teacher = distill.teacher
    walk = distillation_flops(
        forward, distill.global_batch, teacher.micro_steps, guided=teacher.guidance_scale != 1
    )
    step = training_flops(forward, train.global_batch)
    found = []
    for name in (*TRAINING_STAGES, "distillation"):
        last = name == "distillation"
        flops, config = (walk, distill) if last else (step, train)
        used = replace(fleet, gpus=min(fleet.gpus, config.global_batch))  # a clip each, at least
        paper = Fleet(PAPER_GPUS["distillation" if last else "training"], fleet.peak, fleet.mfu)
        found.append(
            {
                "name": name,
                "steps": config.steps,
                "batch": config.global_batch,
                "gpus": used.gpus,
                "step_flops": flops,
                "step_s": used.step_seconds(flops),
                "total_s": config.steps * used.step_seconds(flops),
                "paper_gpus": paper.gpus,
                "paper_gpus_s": config.steps * paper.step_seconds(flops),
            }
        )
    return found


def _memory(model: dict[str, Any], gpu: Gpu) -> list[dict[str, Any]]:
    """Memory of one GPU at every ZeRO stage, and whether it is enough."""
    return [
        {"zero_stage": int(stage), **memory, "fits": memory["total"] < gpu.memory}
        for stage, memory in model["memory"]["training"]["stages"].items()
    ]


def _network(parameters: int, gpus: int, step: float) -> list[dict[str, float]]:
    """What one GPU sends in a step at every ZeRO stage, and the rate that hides it."""
    return [
        {
            "zero_stage": stage,
            "bytes_per_step": (sent := gradient_traffic(parameters, stage, gpus)),
            "rate": sent / step,
        }
        for stage in (1, 2, 3)
    ]


def print_plan(facts: dict[str, Any]) -> None:
    """The facts as tables for people."""
    out = Console(highlight=False)
    out.print(
        f"[bold]{facts['preset']}[/bold] ({format_parameters(facts['parameters'])} parameters) "
        f"on {facts['gpus']:,} {facts['gpu']}, {facts['dataset']['clips']:,.0f} clips"
    )
    out.print(_data_table(facts))
    out.print(_stage_table(facts))
    out.print(_memory_table(facts))
    out.print(_cost_table(facts))
    assumed = facts["assumed"]
    out.print(
        f"Assumed, and better measured: MFU {assumed['mfu']:.0%}; clips keep "
        f"{assumed['keep']:.0%} of the video; "
        f"{assumed['caption_tokens']:g} tokens per caption and encoder; per second, a CPU core "
        f"curates {assumed['curate_rate']:g} s of video and annotates "
        f"{assumed['annotate_rate']:g} clips, a GPU encodes {assumed['encode_rate']:g} clips; "
        f"storage writes {format_bytes(assumed['storage'])}/s; a GPU fails every "
        f"{assumed['gpu_mtbf_h']:,.0f} h, and {assumed['restart_s']:g} s later training goes on.",
        style="dim",
    )


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _data_table(facts: dict[str, Any]) -> Table:
    data, ingest, assumed = facts["dataset"], facts["ingest_s"], facts["assumed"]
    table = _table("data", "size", "made in")
    table.add_row("video", f"{data['raw_video_s'] / 3600:,.0f} h", "")
    table.add_row("  of which in clips", f"{data['video_s'] / 3600:,.0f} h", "")
    cpus, gpus = f"{assumed['ingest_cpus']:,} CPU cores", f"{assumed['ingest_gpus']:,} GPUs"
    table.add_row("  curated", f"{data['clips']:,.0f} clips", _on(ingest["curate"], cpus))
    table.add_row("  annotated", "", _on(ingest["annotate"], cpus))
    table.add_row("latents", format_bytes(data["latent_bytes"]), _on(ingest["encode"], gpus))
    table.add_row("text states", format_bytes(data["text_bytes"]), "")
    table.add_row("shards", f"{data['shards']:,} of 512 MB", "")
    return table


def _on(seconds: float, machines: str) -> str:
    return f"{_hours(seconds)} on {machines}"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds / 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def _stage_table(facts: dict[str, Any]) -> Table:
    table = _table("stage", "steps", "batch", "work per step", "step", "time", "as the paper")
    for stage in facts["stages"]:
        table.add_row(
            stage["name"],
            f"{stage['steps']:,}",
            str(stage["batch"]),
            format_flops(stage["step_flops"]),
            f"{stage['step_s']:.2f} s",
            f"{_hours(stage['total_s'])} on {stage['gpus']}",
            f"{_hours(stage['paper_gpus_s'])} on {stage['paper_gpus']}",
        )
    total, paper = (
        sum(stage[key] for stage in facts["stages"]) for key in ("total_s", "paper_gpus_s")
    )
    table.add_section()
    table.add_row("all", "", "", "", "", _hours(total), _hours(paper))
    return table


def _memory_table(facts: dict[str, Any]) -> Table:
    parts = ("weights", "gradients", "optimizer", "ema")
    table = _table("memory of a GPU", *parts, "transient", "total", "sent per step", "rate")
    for memory, network in zip(facts["memory"], facts["network"], strict=True):
        total = format_bytes(memory["total"]) + ("" if memory["fits"] else " too much")
        cells = [format_bytes(memory[part]) for part in parts]
        cells.append(format_bytes(max(memory["activations"], memory["step"])))
        sent = format_bytes(network["bytes_per_step"])
        rate = f"{format_bytes(network['rate'])}/s"
        table.add_row(f"ZeRO {memory['zero_stage']}", *cells, total, sent, rate)
    return table


def _cost_table(facts: dict[str, Any]) -> Table:
    checkpoint, failures = facts["checkpoint"], facts["failures"]
    table = _table("storage and failures", "")
    table.add_row("training reads", f"{format_bytes(facts['storage_read_rate'])}/s")
    saved = f"{format_bytes(checkpoint['bytes'])} in {checkpoint['save_s']:.1f} s"
    table.add_row("a checkpoint", saved)
    table.add_row("some GPU fails every", _hours(failures["mtbf_s"]))
    table.add_row(
        f"lost, checkpoints every {_hours(failures['interval_s'])} (the preset's)",
        f"{failures['loss']:.2%}",
    )
    table.add_row(
        f"lost at best, every {_hours(failures['best_interval_s'])} "
        f"(checkpoint.every={failures['best_interval_steps']})",
        f"{failures['best_loss']:.2%}",
    )
    return table


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
