"""The options that every configurable command has, written once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jobs.config import available_presets
from streamdit.errors import UserError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.yaml", help="Settings merged over the preset."),
]
"""`--config FILE.yaml`."""

Preset = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="Settings that ship with the package.")
]
"""`--preset NAME`; the command gives the default."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Single settings by dotted key, as in optimizer.learning_rate=1e-4; they win over "
        "files.",
        show_default=False,
    ),
]
"""Trailing `dotted.key=value` arguments."""


Dataset = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="Dataset from `streamdit ingest`: a folder, or s3://bucket/prefix."
    ),
]
"""The dataset that a training command reads."""

RunDirectory = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Directory of the run: checkpoints, metrics, model."),
]
"""`--out DIR`; the command gives the default."""

Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="Ray cluster; default: this machine."),
]
"""`--address ADDRESS`."""


TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server; default: MLFLOW_TRACKING_URI, else the embedded store.",
    ),
]
"""`--tracking-uri URI`."""

TrackingDirectory = Annotated[
    Path, typer.Option("--tracking-dir", metavar="DIR", help="Folder of the embedded store.")
]
"""`--tracking-dir DIR`; the command gives the default."""


DEFAULT_PRESET = "small"
"""What commands with presets take without `--preset`."""


def same_settings(
    stage: str, preset: str | None, file: Path | None = None, overrides: Sequence[str] = ()
) -> str:
    """Options by which another command gets the settings of this one, for a line that names it.

    Args:
        stage: of the other command.
        preset: left out where it is the default, or the stage has none of that name.
        file: settings of the same stage.
        overrides: of the same stage.
    """
    words = []
    if preset and preset != DEFAULT_PRESET and preset in available_presets(stage):
        words += ["--preset", preset]
    if file is not None:
        words += ["--config", str(file)]
    return "".join(f" {shlex.quote(word)}" for word in (*words, *overrides))


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part `inputs` from `key=value` overrides where a command takes both.

    An argument is an override if it looks like `dotted.key=value` and no file of that name
    exists.

    Raises:
        UserError: for an empty argument (an unset shell variable, most often).
    """
    inputs: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if not argument:
            raise UserError("an input is empty: give a file, a folder or an s3:// prefix")
        is_override = _looks_like_override(argument) and not Path(argument).exists()
        (overrides if is_override else inputs).append(argument)
    return inputs, overrides


def _looks_like_override(argument: str) -> bool:
    key, separator, _ = argument.partition("=")
    parts = key.split(".")
    return bool(separator) and all(p.isidentifier() or p.isdigit() for p in parts)
