"""`streamdit describe`: what a model is, how large it is and what it costs to run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.config import available_presets, load_config
from jobs.console import format_bytes, format_flops, format_parameters
from jobs.options import ConfigFile, Overrides
from streamdit.config import BucketConfig, DiTConfig, PartitionConfig, SamplingConfig
from streamdit.errors import UserError
from streamdit.io import CONFIG_FILE, read_model_config
from streamdit.model import StreamDiT
from streamdit.model.flops import count_flops
from streamdit.partition import PartitionScheme

TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8
"""Compression of the autoencoders here; a model directory says for certain."""

TEXT_TOKENS = 64
"""Tokens of a prompt in the operation count of a preset; a model directory names its encoders."""


@dataclass(frozen=True)
class Subject:
    """What is described, whether trained already or only planned."""

    source: str
    model: DiTConfig
    partition: PartitionConfig
    sampling: SamplingConfig
    temporal_factor: int = TEMPORAL_FACTOR
    spatial_factor: int = SPATIAL_FACTOR
    first_frame_alone: bool = False
    text_tokens: int = TEXT_TOKENS
    fps: float | None = None


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|MODEL_DIR",
            help="A training preset, such as demo, or a directory that train or distill wrote.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as JSON, for scripts.")
    ] = False,
) -> None:
    """Show what a model is: parameters, memory, shapes, partitions and cost of a step.

    Nothing is trained or loaded, so this also answers what a change of settings would do:
    `streamdit describe demo model.width=512`.
    """
    facts = describe(find_subject(source, config, overrides or []))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)


def find_subject(source: str, config: Path | None, overrides: list[str]) -> Subject:
    """The configuration that `source` names.

    Raises:
        UserError: if it is neither a preset nor a model directory, or does not validate.
    """
    if (Path(source) / CONFIG_FILE).is_file():
        if config or overrides:
            raise UserError(
                f"{source} is a trained model, whose settings are fixed: drop --config and "
                "KEY=VALUE, or describe a preset"
            )
        return _trained(source)
    presets = available_presets("train")
    if source not in presets:
        raise UserError(
            f"{source} is neither a training preset ({', '.join(presets) or 'none installed'}) nor "
            f"a model directory (it has no {CONFIG_FILE}): give one of these"
        )
    from training.config import TrainConfig

    plan = load_config(TrainConfig, stage="train", preset=source, file=config, overrides=overrides)
    return Subject(f"preset {source}", plan.model, plan.partition, plan.sampling)


def _trained(directory: str) -> Subject:
    config = read_model_config(directory)
    return Subject(
        source=directory,
        model=config.model,
        partition=config.partition,
        sampling=config.sampling,
        temporal_factor=config.autoencoder.temporal_factor,
        spatial_factor=config.autoencoder.spatial_factor,
        first_frame_alone=config.autoencoder.first_frame_alone,
        text_tokens=sum(encoder.max_tokens for encoder in config.text_encoders),
        fps=config.fps,
    )


def describe(subject: Subject) -> dict[str, Any]:
    """All facts as plain data; sizes in bytes, cost in floating-point operations."""
    parts = count_parameters(subject.model)
    total = sum(parts.values())
    return {
        "source": subject.source,
        "parameters": total,
        "parameters_by_part": parts,
        "weights_bytes": {"bfloat16": 2 * total, "float32": 4 * total},
        "buckets": [_describe_bucket(subject, bucket) for bucket in subject.model.buckets],
        "text_encoders": dict(subject.model.text),
        "text_tokens": subject.text_tokens,
        "fps": subject.fps,
        "partition": _describe_mix(subject),
        "gamma": subject.partition.gamma.model_dump(),
        "sampling": _describe_sampling(subject),
    }


def count_parameters(config: DiTConfig) -> dict[str, int]:
    """Parameters of each part, the blocks' parts summed over all blocks; nothing is allocated."""
    with torch.device("meta"):
        model = StreamDiT(config)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        path = name.split(".")
        # blocks.<index>.<part>.… counts as blocks.<part>
        parts[f"blocks.{path[2]}" if path[0] == "blocks" else path[0]] += parameter.numel()
    return dict(parts)


def _describe_bucket(subject: Subject, bucket: BucketConfig) -> dict[str, Any]:
    frames = bucket.frames * subject.temporal_factor
    if subject.first_frame_alone:
        frames -= subject.temporal_factor - 1
    flops = count_flops(subject.model, bucket, subject.text_tokens)
    return {
        "latent": [bucket.frames, subject.model.latent_channels, bucket.height, bucket.width],
        "video": [
            frames,
            bucket.height * subject.spatial_factor,
            bucket.width * subject.spatial_factor,
        ],
        "tokens": list(subject.model.token_grid(bucket)),
        "window": list(bucket.window),
        "flops_per_forward": flops["total"],
        "flops_by_part": {name: count for name, count in flops.items() if name != "total"},
    }


def _describe_mix(subject: Subject) -> list[dict[str, Any]]:
    total = sum(entry.weight for entry in subject.partition.entries)
    mix = []
    for entry in subject.partition.entries:
        scheme = PartitionScheme.for_buffer(
            subject.model.buffer_frames,
            entry.chunk_frames,
            reference_frames=entry.reference_frames,
        )
        share = entry.weight / total
        mix.append({"K": scheme.K, "N": scheme.N, "c": scheme.c, "share": share})
    return mix


def _describe_sampling(subject: Subject) -> dict[str, Any]:
    scheme = PartitionScheme.from_sampling(subject.model.buffer_frames, subject.sampling)
    per_step = 1 if subject.sampling.guidance_scale == 1.0 else 2
    return {
        "K": scheme.K,
        "N": scheme.N,
        "c": scheme.c,
        "s": scheme.s,
        "guidance_scale": subject.sampling.guidance_scale,
        "steps_per_frame": scheme.total_steps,
        "evaluations_per_chunk": scheme.s * per_step,
        "video_frames_per_chunk": scheme.c * subject.temporal_factor,
    }


def _print_facts(facts: dict[str, Any]) -> None:
    out = Console(highlight=False)
    out.print(Text(str(facts["source"]), style="bold"))
    weights = facts["weights_bytes"]
    summary = _grid()
    summary.add_row(
        "parameters", f"{format_parameters(facts['parameters'])} ({facts['parameters']:,})"
    )
    summary.add_row(
        "weights",
        f"{format_bytes(weights['bfloat16'])} in bfloat16, "
        f"{format_bytes(weights['float32'])} in float32",
    )
    for bucket in facts["buckets"]:
        _add_bucket(summary, bucket, facts["fps"])
    encoders = (f"{name} (width {width})" for name, width in facts["text_encoders"].items())
    summary.add_row("text", f"{', '.join(encoders)}; {facts['text_tokens']} tokens counted")
    _add_streaming(summary, facts)
    out.print(summary)
    out.print(_part_table(facts))


def _add_bucket(summary: Table, bucket: dict[str, Any], fps: float | None) -> None:
    frames, height, width = bucket["video"]
    rate = f" at {fps:g} frames per second" if fps else ""
    summary.add_row("video", f"{frames} frames of {height}×{width}{rate}")
    latent_frames, channels, rows, columns = bucket["latent"]
    tokens = bucket["tokens"][0] * bucket["tokens"][1] * bucket["tokens"][2]
    summary.add_row(
        "  latent", f"{latent_frames} frames × {channels} channels × {rows} × {columns}"
    )
    summary.add_row(
        "  tokens",
        f"{_times(bucket['tokens'])} = {tokens:,}, attention windows of {_times(bucket['window'])}",
    )
    summary.add_row("  one evaluation", f"{format_flops(bucket['flops_per_forward'])}")


def _add_streaming(summary: Table, facts: dict[str, Any]) -> None:
    gamma = facts["gamma"]
    strength = {"exponential": gamma["power"], "shifted": gamma["shift"]}.get(gamma["kind"])
    schedule = gamma["kind"] + (f" {strength:g}" if strength is not None else "")
    mix = "\n".join(
        f"K={entry['K']} N={entry['N']} c={entry['c']}: {entry['share']:.0%}"
        for entry in facts["partition"]
    )
    summary.add_row("partition mix", f"{mix}\nnoise schedule {schedule}")
    sampling = facts["sampling"]
    guidance = sampling["guidance_scale"]
    summary.add_row(
        "streaming",
        f"K={sampling['K']} N={sampling['N']} c={sampling['c']} s={sampling['s']}, "
        + (f"guidance {guidance:g}" if guidance != 1 else "no guidance"),
    )
    cost = facts["buckets"][0]["flops_per_forward"] * sampling["evaluations_per_chunk"]
    summary.add_row(
        "  one chunk",
        f"{sampling['video_frames_per_chunk']} video frames for "
        f"{_count(sampling['evaluations_per_chunk'], 'evaluation')} "
        f"({format_flops(cost)})",
    )
    summary.add_row("  one frame", f"{sampling['steps_per_frame']} denoising steps in all")


def _part_table(facts: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for name, count in facts["parameters_by_part"].items():
        table.add_row(name, f"{count:,}", f"{count / facts['parameters']:.1%}")
    return table


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _times(numbers: list[int]) -> str:
    return " × ".join(str(number) for number in numbers)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
