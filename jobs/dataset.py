"""`streamdit dataset`: look at a dataset, check it, mend it, take sources out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.console import format_bytes, format_duration, progress, say
from jobs.errors import JobCommand
from jobs.options import Address
from jobs.runtime import ray_runtime
from pipeline.check import CheckResult, check_dataset
from pipeline.lock import writing
from pipeline.overview import Overview, find_clip, read_overview
from pipeline.pictures import STRIP_FRAMES, clip_frames, encode_image, strip
from pipeline.removal import remove_source
from pipeline.repair import repair_dataset
from pipeline.report import STAGE_WORK, write_report
from streamdit.errors import UserError

PROBLEMS_SHOWN = 20
PROBLEM_STATUS = 1
STRIP_HEIGHT = 180

command = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

DatasetName = Annotated[
    str, typer.Argument(metavar="DATASET", help="Dataset: a folder, or s3://bucket/prefix.")
]


@command.callback()
def overview() -> None:
    """Look at a dataset, check it, mend it, take sources out of it."""


@command.command("show", cls=JobCommand)
def show(
    dataset: DatasetName,
    clip: Annotated[
        str | None,
        typer.Argument(
            metavar="CLIP", help="Id of one clip, or its beginning.", show_default=False
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write a page with charts and pictures."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE.png", help="Write the clip as a strip of frames."),
    ] = None,
) -> None:
    """Tell what a dataset holds, how far it is and what failed; or show one clip."""
    if clip is not None:
        show_clip(dataset, clip, picture)
        return
    if picture is not None:
        raise UserError("--picture shows one clip: name it, as in `streamdit dataset show D CLIP`")
    found = read_overview(dataset)
    print_overview(found)
    if report is not None:
        with progress("report", "parts") as on_progress:
            write_report(found, report, lambda done, total: on_progress(done, total, {}))
        Console(highlight=False).print(Text(f"page  {report}"))


def show_clip(dataset: str, clip_id: str, picture: Path | None) -> None:
    """Print the row of a clip, and write its frames as a picture."""
    row = find_clip(dataset, clip_id)
    if row is None:
        raise UserError(
            f"dataset {dataset} has no clip {clip_id}: the ids of its clips are in the selection "
            "and in the clip tables"
        )
    table = _grid()
    for name, value in row.items():
        table.add_row(name, Text("–" if value is None else _plain(value)))
    Console(highlight=False).print(table)
    if picture is not None:
        frames = clip_frames(row, STRIP_FRAMES, STRIP_HEIGHT)
        if frames is None:
            raise UserError(
                f"clip {row['clip_id']} cannot be decoded: check that {row['uri']} is there"
            )
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(encode_image(strip(frames), ".png"))
        Console(highlight=False).print(Text(f"picture  {picture}"))


def print_overview(found: Overview) -> None:
    """Show on stdout what a dataset holds."""
    table = _grid()
    table.add_row("videos", f"{len(found.sources):,}, {format_duration(found.video_s)} together")
    for stage in found.stages:
        shown = [(stage.counters.get(key, 0), name) for key, name in STAGE_WORK[stage.name]]
        counts = ", ".join(f"{count:,.0f} {name}" for count, name in shown if count)
        state = "done" if stage.done == stage.units else f"{stage.done:,} of {stage.units:,} units"
        table.add_row(stage.name, Text(f"{state}  {counts}"))
    buckets = ", ".join(f"{name} × {count:,}" for name, count in found.buckets.most_common())
    table.add_row("buckets", Text(buckets or "none"))
    if statuses := found.statuses:
        table.add_row("captions", ", ".join(f"{k} {v:,}" for k, v in statuses.most_common()))
    if found.manifest and found.selected is not None:
        selection = found.manifest.selection
        held_out = found.selected["split"].to_pylist().count("held_out")
        text = f"{selection.rows:,} clips by {selection.expression!r}, {held_out:,} held out"
        table.add_row("selection", Text(f"{text} (version {selection.version})"))
    else:
        table.add_row("selection", Text("none yet: not ready for training", style="yellow"))
    sizes = sorted(found.bytes.items(), key=lambda item: -item[1])
    shown_sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes if name != ".")
    table.add_row("bytes", Text(shown_sizes))
    for reason in found.dead:
        text = f"{reason.count:,} × {reason.error_class} in {reason.stage}: {reason.message}"
        table.add_row("dead", Text(f"{text} ({reason.uri})", style="yellow"))
    Console(highlight=False).print(table)


@command.command("verify", cls=JobCommand)
def verify(dataset: DatasetName) -> None:
    """Compare every file with its record: there, whole, and leading where the index says.

    Exit status 1 if something is wrong.
    """
    with progress("verify", "files") as on_progress:
        result = check_dataset(dataset, on_progress)
    print_check(result)
    if result.problems:
        say(f"`streamdit dataset repair {dataset}` makes what is damaged again from the videos")
        raise typer.Exit(PROBLEM_STATUS)


def print_check(result: CheckResult) -> None:
    """Show on stdout what a check found."""
    table = _grid()
    table.add_row("checked", f"{result.files:,} files, {format_bytes(result.bytes)}")
    table.add_row("state", "complete" if result.complete else "no manifest: not ready for training")
    if not result.problems:
        table.add_row("problems", "none")
    for problem in result.problems[:PROBLEMS_SHOWN]:
        table.add_row("problem", Text(f"{problem.path}: {problem.message}", style="yellow"))
    if len(result.problems) > PROBLEMS_SHOWN:
        table.add_row("", f"{len(result.problems) - PROBLEMS_SHOWN:,} more")
    Console(highlight=False).print(table)


@command.command("repair", cls=JobCommand)
def repair(dataset: DatasetName, address: Address = None) -> None:
    """Drop what is damaged and make it again, with the settings of the dataset."""
    with writing(dataset, "streamdit dataset repair", say), ray_runtime(address):
        summary = repair_dataset(dataset, _progress)
    table = _grid()
    table.add_row("mended", f"{len(summary.problems):,} problems, {summary.units:,} units")
    Console(highlight=False).print(table)


@command.command("remove", cls=JobCommand)
def remove(
    dataset: DatasetName,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Address, file name or id of a video.")
    ],
) -> None:
    """Take a video out, with every trace: captions, scores, latents, index, ledger.

    Its hash is kept, so that it does not come back with the next ingestion.
    """
    with writing(dataset, "streamdit dataset remove", say):
        summary = remove_source(dataset, source)
    table = _grid()
    table.add_row("removed", Text(f"{', '.join(summary.uris)}, {summary.clips:,} clips"))
    Console(highlight=False).print(table)


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    with progress(title) as on_progress:
        yield on_progress


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    command()
