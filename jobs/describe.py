"""`streamdit describe`: what a model is, how large it is and what it costs to run."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.console import format_bytes, format_flops, format_parameters
from jobs.model_facts import describe, find_subject
from jobs.options import ConfigFile, Overrides
from streamdit.errors import UserError
from streamdit.gpus import GPUS


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
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help=f"One of {', '.join(GPUS)}.")
    ] = "h100",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as JSON, for scripts.")
    ] = False,
) -> None:
    """Show what a model is: parameters, shapes, partitions, memory, and the least time of a step.

    Nothing is trained or loaded, so this also answers what a change of settings would do:
    `streamdit describe streamdit-4b zero_stage=3 launch.workers=64 --gpu h200`.
    """
    if gpu.lower() not in GPUS:
        raise UserError(f"--gpu {gpu} is not known: choose one of {', '.join(GPUS)}")
    facts = describe(find_subject(source, config, overrides or []), GPUS[gpu.lower()])
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)


def _print_facts(facts: dict[str, Any]) -> None:
    out = Console(highlight=False)
    out.print(Text(str(facts["source"]), style="bold"))
    out.print(_summary(facts))
    out.print(_part_table(facts))
    out.print(_inference_table(facts))
    out.print(_training_table(facts))
    out.print(_activations(facts["memory"]["training"]), style="dim")
    out.print(_floor_table(facts))
    floor = facts["floor"]
    out.print(f"{floor['rates']} ({floor['rates_source']})", style="dim")


def _summary(facts: dict[str, Any]) -> Table:
    weights = facts["weights_bytes"]
    summary = Table.grid(padding=(0, 2))
    summary.add_column(style="dim", no_wrap=True)
    summary.add_column(overflow="fold")
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
    return summary


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
    table = _table("part of the model", "parameters", "share")
    for name, count in facts["parameters_by_part"].items():
        table.add_row(name, f"{count:,}", f"{count / facts['parameters']:.1%}")
    return table


def _inference_table(facts: dict[str, Any]) -> Table:
    memory = facts["memory"]["inference"]
    table = _table("memory of one stream", "bytes")
    table.add_row("model, bf16", format_bytes(memory["model"]))
    for name, size in memory["text_encoders"].items():
        table.add_row(f"text encoder {name}, bf16", _size(size))
    table.add_row("autoencoder, float32", _size(memory["autoencoder"]))
    table.add_row("keys and values of the text", format_bytes(memory["text_keys_values"]))
    table.add_row("a block while it runs", format_bytes(memory["largest_block"]))
    unknown = memory["autoencoder"] is None or None in memory["text_encoders"].values()
    rest = "what is not known" if unknown else "the decoder's own tensors"
    table.add_row(f"total, without {rest}", format_bytes(memory["total"]))
    return table


def _training_table(facts: dict[str, Any]) -> Table:
    memory = facts["memory"]["training"]
    devices = _count(memory["world_size"], "device")
    table = _table(f"training on {devices}, each", "ZeRO 1", "ZeRO 2", "ZeRO 3")
    names = {"ema": "averaged weights", "step": "or, for the optimizer's step"}
    for name in ("weights", "gradients", "optimizer", "ema", "activations", "step", "total"):
        sizes = (format_bytes(stage[name]) for stage in memory["stages"].values())
        table.add_row(names.get(name, name), *sizes)
    fewest = memory["fewest_recomputed"].values()
    table.add_row(
        f"activation_checkpointing on {facts['floor']['gpu']}",
        *("not enough" if blocks is None else str(blocks) for blocks in fewest),
    )
    return table


def _activations(memory: dict[str, Any]) -> str:
    kept, recomputed = (format_bytes(size) for size in memory["activations"].values())
    clips = _count(memory["micro_batch"], "clip")
    blocks = _count(memory["recomputed_blocks"], "block")
    return (
        f"{clips} at once, activations of {blocks} recomputed ({kept} if of none, {recomputed} if "
        "of all); the last row is the fewest blocks that leave a tenth of the memory free"
    )


def _floor_table(facts: dict[str, Any]) -> Table:
    floor, sampling = facts["floor"], facts["sampling"]
    evaluations = _count(sampling["evaluations_per_step"], "evaluation")
    table = _table(f"least time on one {floor['gpu']}", "as configured", "distilled")
    table.add_row("a step", evaluations, "1 evaluation")
    for name, row in (
        ("flops", "its operations"),
        ("compute", "  at peak rate"),
        ("bandwidth", "reading its weights once"),
        ("step", "so it takes at least"),
        ("step_fp8", "  all of it in fp8"),
    ):
        show = format_flops if name == "flops" else _seconds
        table.add_row(row, *(show(floor[kind][name]) for kind in ("configured", "distilled")))
    table.add_row("steps a chunk", str(sampling["s"]), "1")
    rates = (floor[kind]["frames_per_second"] for kind in ("configured", "distilled"))
    table.add_row("so at most", *(f"{rate:,.1f} frames/s" for rate in rates))
    table.add_row("training, one micro-batch", _seconds(floor["training_micro_batch"]), "")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _size(count: int | None) -> str:
    return "not known" if count is None else format_bytes(count)


def _seconds(seconds: float | None) -> str:
    """`1.2 µs`, `97.3 ms`, `1.94 s`, and nothing for no time at all."""
    if seconds is None:
        return "–"
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:,.3g} s"


def _times(numbers: list[int]) -> str:
    return " × ".join(str(number) for number in numbers)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
