"""The `streamdit` command: an overview that starts at once, and commands loaded when asked for.

Each command is the function `command` of a module of its own. Importing those modules is slow
(PyTorch, Ray, MLflow), so the overview knows them by the table below only.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobs.errors import JobCommand, one_line_errors


@dataclass(frozen=True)
class Entry:
    """Where a command is, and its line in the overview."""

    module: str
    help: str
    panel: str


COMMANDS = {
    "demo": Entry("jobs.demo", "Run the whole path, small, on this machine.", "Start here"),
    "doctor": Entry("jobs.doctor", "Show what this machine has and what is missing.", "Start here"),
    "ingest": Entry("jobs.ingest", "Turn videos into a dataset to train on.", "Data"),
    "dataset": Entry("jobs.dataset", "Look at a dataset, check it, mend it.", "Data"),
    "select": Entry("jobs.select", "Choose which clips are trained on.", "Data"),
    "train-autoencoder": Entry(
        "jobs.train_autoencoder", "Train the autoencoder that makes the latents.", "Train"
    ),
    "convert": Entry("jobs.convert", "Turn an open Wan model into one to start from.", "Train"),
    "train": Entry("jobs.train", "Train a streaming text-to-video model.", "Train"),
    "rollouts": Entry("jobs.rollouts", "Keep a teacher's rollouts to distil from.", "Train"),
    "distill": Entry("jobs.distill", "Distil it to one evaluation per chunk.", "Train"),
    "export": Entry("jobs.export", "Turn a checkpoint into a model to use.", "Train"),
    "runs": Entry("jobs.runs", "List training runs and where they stand.", "Train"),
    "register": Entry("jobs.register", "Put a model into the MLflow registry.", "Use"),
    "models": Entry("jobs.models", "List the registered models.", "Use"),
    "generate": Entry("jobs.generate", "Stream video from a model to a file.", "Use"),
    "plan": Entry("jobs.plan", "Show what a training project of some size needs.", "Cluster"),
    "submit": Entry("jobs.submit", "Run one of these jobs on a Ray cluster.", "Cluster"),
    "jobs": Entry("jobs.ray_jobs", "List, follow and stop jobs on a cluster.", "Cluster"),
    "describe": Entry("jobs.describe", "Show the size and cost of a model.", "Use"),
    "bench": Entry("jobs.bench", "Measure how fast and how well a model streams.", "Use"),
}


class LazyGroup(TyperGroup):
    """The overview: holds a placeholder per command and loads the one that is called."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Replace the placeholder that `args` name by the real command."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, placeholder, rest
        with one_line_errors():
            module = importlib.import_module(COMMANDS[name].module)
            return name, build_command(module.command, name), rest


def build_command(function: Callable[..., Any] | typer.Typer, name: str) -> Any:
    """The typer command of a job's function, or of its group of commands, named as in the table."""
    if isinstance(function, typer.Typer):
        return typer.main.get_command(function)
    settings = inspect.unwrap(function).__globals__.get("CONTEXT_SETTINGS")
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(name, cls=JobCommand, context_settings=settings)(function)
    return typer.main.get_command(app)


def run_as_module(function: Callable[..., Any]) -> None:
    """Run a job's function as `python -m jobs.<name>`, with the options of the command."""
    _quiet_libraries()
    # The module is `__main__` by now, so its name is read off its file.
    name = Path(inspect.getfile(function)).stem
    build_command(function, name)(prog_name=f"python -m jobs.{name}")


def main() -> None:
    """Entry point of `streamdit`."""
    _quiet_libraries()
    app(prog_name="streamdit")


def _quiet_libraries() -> None:
    """Defaults for libraries that talk at start-up or call home; the environment wins."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"streamdit {_version()}")
        raise typer.Exit()


def _version() -> str:
    try:
        return metadata.version("streamdit")
    except metadata.PackageNotFoundError:
        return "(not installed: running from a checkout)"


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(
    epilog="Commands with settings take --preset NAME, --config FILE.yaml and KEY=VALUE; "
    "`streamdit COMMAND --help` tells more."
)
def _overview(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """StreamDiT: from raw video to a text-to-video model that streams in real time."""


def _add_placeholder(name: str, entry: Entry) -> None:
    @app.command(name, help=entry.help, rich_help_panel=entry.panel)
    def placeholder() -> None:
        raise AssertionError(f"{name} was not loaded")


for _name, _entry in COMMANDS.items():
    _add_placeholder(_name, _entry)


if __name__ == "__main__":
    main()
