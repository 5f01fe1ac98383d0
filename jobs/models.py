"""`streamdit models`: what is in the MLflow registry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.console import console, say
from jobs.options import TrackingDirectory, TrackingUri
from streamdit.errors import UserError
from training.config import TrackingConfig
from training.registry import list_versions
from training.tracking import embedded_uri
from training.tracking import tracking_uri as resolve_uri

SHOWN_SCORES = 4


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this registered model.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON instead of a table.")
    ] = False,
    tracking_uri: TrackingUri = None,
    tracking_directory: TrackingDirectory = Path("runs/mlflow"),
) -> None:
    """List the versions of registered models: aliases, scheme, teacher and scores.

    With --json also all other tags: data set, git revision, hashes, run.
    """
    tracking = TrackingConfig(uri=tracking_uri, directory=str(tracking_directory))
    check_store(tracking)
    versions = list_versions(tracking, name)
    if as_json:
        typer.echo(json.dumps(versions, indent=2))
    elif versions:
        show(versions)
    else:
        say(
            f"no model is registered in {resolve_uri(tracking)}; put one there with "
            "`streamdit register MODEL_DIR --name NAME --alias ALIAS`"
        )


def check_store(tracking: TrackingConfig) -> None:
    """Refuse an embedded store that is not there, instead of making an empty one."""
    database = Path(tracking.directory) / "mlflow.db"
    if resolve_uri(tracking) == embedded_uri(tracking.directory) and not database.is_file():
        raise UserError(
            f"there is no MLflow store in {tracking.directory}; name one with --tracking-dir DIR, "
            "--tracking-uri URI or MLFLOW_TRACKING_URI"
        )


def show(versions: Sequence[dict[str, Any]]) -> None:
    """The table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "aliases", "scheme", "teacher", "scores"):
        table.add_column(heading, no_wrap=heading != "teacher", overflow="fold")
    for version in versions:
        tags = version["tags"]
        when = datetime.fromtimestamp(version["created_ms"] / 1000)
        table.add_row(
            f"{version['name']}/{version['version']}\n[dim]{when:%Y-%m-%d}[/dim]",
            "\n".join(version["aliases"]) or "–",
            scheme_of(tags),
            tags.get("teacher") or tags.get("teacher_sha256", "–")[:12],
            scores_of(version["scores"]),
        )
    console.print(table)


def scheme_of(tags: dict[str, str]) -> str:
    """`K=0 N=8 c=2 s=1`, and below it the guidance where there is some."""
    scheme = " ".join(f"{key}={tags.get(key, '?')}" for key in ("K", "N", "c", "s"))
    guidance = tags.get("guidance_scale", "1")
    return scheme if guidance == "1" else f"{scheme}\nw={guidance}"


def scores_of(scores: dict[str, float]) -> str:
    """The first few scores, and how many more there are."""
    shown = [f"{key} {value:.3g}" for key, value in list(scores.items())[:SHOWN_SCORES]]
    more = len(scores) - len(shown)
    return "\n".join([*shown, *([f"and {more} more"] if more else [])]) or "–"


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
