"""`streamdit register`: a model directory into the MLflow registry, under an alias."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.console import say
from training.config import TrackingConfig


def command(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", help="Directory that train or distill wrote."),
    ],
    name: Annotated[str, typer.Option("--name", help="Registered model.")] = "streamdit",
    alias: Annotated[
        str | None, typer.Option("--alias", help="Alias that will point to the new version.")
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            metavar="URI",
            help="MLflow server; default: MLFLOW_TRACKING_URI, else the embedded store.",
        ),
    ] = None,
    tracking_directory: Annotated[
        Path, typer.Option("--tracking-dir", metavar="DIR", help="Folder of the embedded store.")
    ] = Path("runs/mlflow"),
) -> None:
    """Put a model into the MLflow registry, so that anyone can load it by name and alias."""
    from training.registry import register

    tracking = TrackingConfig(uri=tracking_uri, directory=str(tracking_directory))
    registered = register(model, name, alias, tracking)
    say(f"registered {registered.name} version {registered.version} in {registered.tracking_uri}")
    say(
        f"next: MLFLOW_TRACKING_URI={registered.tracking_uri} streamdit generate "
        f'{registered.uri} --prompt "..." --out video.mp4'
    )


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
