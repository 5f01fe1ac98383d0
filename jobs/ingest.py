"""`streamdit ingest`: from raw videos to a dataset of latents, in three resumable jobs."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.config import available_presets, load_config
from jobs.console import format_bytes, format_duration, progress, say
from jobs.options import DEFAULT_PRESET, ConfigFile, Preset, same_settings, split_overrides
from jobs.runtime import ray_runtime
from pipeline.annotate import AnnotateSummary, annotate
from pipeline.config import IngestConfig
from pipeline.curate import CurateSummary, curate
from pipeline.encode import EncodeSummary, encode
from pipeline.latents import latent_shape
from pipeline.lock import writing
from pipeline.schema import MANIFEST_FILE, read_dead_letters
from streamdit.autoencoder import load_autoencoder
from streamdit.errors import UserError
from training.config import TrainConfig

REASONS_SHOWN = 3


class Stage(StrEnum):
    """The three jobs, in the order in which they run."""

    CURATE = "curate"
    ANNOTATE = "annotate"
    ENCODE = "encode"


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT|KEY=VALUE",
            help="Videos: files, folders, s3:// prefixes, WebDataset archives (.tar), text files "
            "that list them, or tables (.csv, .jsonl, .parquet) with captions and licences. "
            "Single settings may follow, as in clip.frames=64.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="DATASET", help="Dataset to write: a folder, or s3://bucket/prefix."
        ),
    ] = "data",
    autoencoder: Annotated[
        str | None,
        typer.Option(
            "--autoencoder",
            metavar="DIR|NAME",
            help="What makes the latents: a directory from train-autoencoder, or a diffusers VAE "
            "by path or hub name.",
        ),
    ] = None,
    only: Annotated[
        list[Stage] | None,
        typer.Option("--only", help="Run this job alone; repeat it for two of the three."),
    ] = None,
    retry_dead: Annotated[
        bool, typer.Option("--retry-dead", help="Try again whatever failed in earlier runs.")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Do again what was made with other settings or another autoencoder."
        ),
    ] = False,
    preset: Preset = DEFAULT_PRESET,
    config: ConfigFile = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", help="Ray cluster; default: here.")
    ] = None,
) -> None:
    """Turn videos into a dataset to train on: curate, annotate, encode.

    curate finds scenes and scores them, annotate writes captions (from .vtt, .json or .txt files
    beside the videos, or from a captioning model), encode makes the latents. Finished parts are
    kept: the same command again continues, and takes in videos that are new. A video that cannot
    be read is noted in the dataset and stops nothing.
    """
    inputs, overrides = split_overrides(arguments or [])
    stages = [stage for stage in Stage if not only or stage in only]
    settings = load_config(
        IngestConfig, stage="ingest", preset=preset, file=config, overrides=overrides
    )
    check_request(stages, inputs, out, autoencoder, settings)
    if Stage.ENCODE in stages and autoencoder is not None:
        warn_of_channels(autoencoder, preset)
    with writing(out, "streamdit ingest", say), ray_runtime(address):
        facts = run_stages(
            stages, inputs, out, autoencoder, settings, retry_dead=retry_dead, replace=replace
        )
    print_summary(out, stages, facts, preset)


def check_request(
    stages: list[Stage],
    inputs: list[str],
    dataset: str,
    autoencoder: str | None,
    config: IngestConfig,
) -> None:
    """Refuse, before any work, what a later job could not finish.

    Raises:
        UserError: without inputs, or without an autoencoder that fits the clips.
    """
    if Stage.CURATE in stages and not inputs:
        raise UserError(
            "no videos are given: name files, folders, lists or s3:// prefixes, as in "
            f"`streamdit ingest my_videos/ --out {dataset}`"
        )
    if Stage.ENCODE not in stages:
        return
    if autoencoder is None:
        raise UserError(
            "encode needs --autoencoder: train one with `streamdit ingest ... --only curate` and "
            f"`streamdit train-autoencoder {dataset} --out DIR`, or name a diffusers VAE"
        )
    loaded = load_autoencoder(autoencoder)
    for shape in config.clip.shapes:
        latent_shape(loaded, shape)


def warn_of_channels(autoencoder: str, preset: str) -> None:
    """Say before anything is encoded that training's preset of the same name will refuse it."""
    if preset not in available_presets("train"):
        return
    wanted = load_config(TrainConfig, stage="train", preset=preset).model.latent_channels
    made = load_autoencoder(autoencoder).identity.latent_channels
    if made != wanted:
        say(
            f"note: {autoencoder} makes latents of {made} channels, but `streamdit train --preset "
            f"{preset}` takes {wanted}: train with model.latent_channels={made}, or --from a model "
            "that has them, or give another autoencoder now"
        )


def run_stages(
    stages: list[Stage],
    inputs: list[str],
    dataset: str,
    autoencoder: str | None,
    config: IngestConfig,
    *,
    retry_dead: bool = False,
    replace: bool = False,
) -> dict[str, str]:
    """Run the chosen jobs one after the other, with progress, in the Ray runtime that is up.

    Returns:
        What each job found, by name, for people.
    """
    facts: dict[str, str] = {}
    if Stage.CURATE in stages:
        with progress("curate") as on_progress:
            curated = curate(
                inputs, dataset, config, on_progress, retry_dead=retry_dead, replace=replace
            )
            facts |= curated_facts(curated)
    if Stage.ANNOTATE in stages:
        with progress("annotate") as on_progress:
            annotated = annotate(dataset, config, on_progress, retry_dead=retry_dead)
            facts |= annotated_facts(annotated)
    if Stage.ENCODE in stages:
        assert autoencoder is not None
        with progress("encode") as on_progress:
            encoded = encode(
                dataset, autoencoder, config, on_progress, retry_dead=retry_dead, replace=replace
            )
            facts |= encoded_facts(encoded, config)
    return facts


def curated_facts(summary: CurateSummary) -> dict[str, str]:
    """Videos, and what was left aside."""
    facts = {
        "videos": f"{summary.sources:,} of {format_duration(summary.video_s)} together",
        "clips": f"{summary.clips:,}, {summary.duplicates:,} of them near duplicates",
    }
    if summary.skipped:
        reasons = (f"{reason} {count:,}" for reason, count in summary.skipped.items())
        facts["left aside"] = ", ".join(reasons)
    return facts


def annotated_facts(summary: AnnotateSummary) -> dict[str, str]:
    """Captions, and what to do if there are none."""
    text = f"{summary.captions:,} of {summary.clips:,} clips"
    if not summary.captions:
        text += (
            ": put .vtt, .json or .txt files of the same name beside the videos, or set "
            "captions.captioner=coca"
        )
    return {"captions": text}


def encoded_facts(summary: EncodeSummary, config: IngestConfig) -> dict[str, str]:
    """What there is to train on."""
    buckets = ", ".join(shape.name for shape in config.clip.shapes)
    return {
        "selected": f"{summary.clips:,} clips by {config.selection.expression!r}, "
        f"{format_duration(summary.video_s)} together, {summary.held_out:,} of them held out",
        "latents": f"{format_bytes(summary.latent_bytes)}, clips of {buckets} "
        f"at {config.clip.fps:g} FPS",
    }


def print_summary(
    dataset: str, stages: list[Stage], facts: dict[str, str], preset: str = DEFAULT_PRESET
) -> None:
    """Show on stdout what was found, what failed, where it is, and what to do next."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(name, Text(text))
    _add_dead_letters(table, dataset)
    if Stage.ENCODE in stages:
        table.add_row("manifest", Text(f"{dataset.rstrip('/')}/{MANIFEST_FILE}"))
    table.add_row("next", Text(next_step(dataset, stages, preset)))
    Console(highlight=False).print(table)


def _add_dead_letters(table: Table, dataset: str) -> None:
    letters = read_dead_letters(dataset).select(["stage", "error_class", "retryable"]).to_pylist()
    if not letters:
        table.add_row("failed", "nothing")
        return
    reasons = Counter(f"{letter['error_class']} in {letter['stage']}" for letter in letters)
    top = reasons.most_common(REASONS_SHOWN)
    shown = [f"{count:,} × {reason}" for reason, count in top]
    if rest := len(letters) - sum(count for _, count in top):
        shown.append(f"{rest:,} more")
    table.add_row("failed", Text(f"{len(letters):,}: {', '.join(shown)}", style="yellow"))
    retryable = sum(bool(letter["retryable"]) for letter in letters)
    if retryable:
        table.add_row("", f"{retryable:,} may succeed when the same command runs again")
    table.add_row(
        "", Text(f"`streamdit dataset show {dataset}` tells why; --retry-dead tries again")
    )


def next_step(dataset: str, stages: list[Stage], preset: str = DEFAULT_PRESET) -> str:
    """What a person types after these jobs, which had the settings of `preset`."""
    if Stage.ENCODE in stages:
        return f"streamdit train {dataset} --out runs/train{same_settings('train', preset)}"
    if Stage.ANNOTATE in stages:
        more = same_settings("autoencoder", preset)
        return f"streamdit train-autoencoder {dataset} --out runs/autoencoder{more}"
    return "the same command with --only annotate"


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
