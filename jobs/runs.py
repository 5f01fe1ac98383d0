"""`streamdit runs`: what has been trained, and where each run stands."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.console import format_duration
from streamdit.errors import UserError

SILENT_AFTER_S = 600
"""A run that says it is running but has logged nothing for so long has probably been killed."""


@dataclass(frozen=True)
class RunRow:
    """A run, as the table shows it.

    Attributes:
        name: the run's name.
        run_id: MLflow's id.
        parent: id of the run above it (a recipe), if any.
        experiment: MLflow experiment.
        status: MLflow's word for it, in lower case.
        step: last step that was logged.
        steps: steps that it will have.
        loss: loss of that step.
        dataset: dataset directory.
        started: when, in seconds since 1970.
        heard: when it last logged anything, likewise.
        model: model directory, once there is one.
    """

    name: str
    run_id: str
    parent: str | None
    experiment: str
    status: str
    step: int | None
    steps: int | None
    loss: float | None
    dataset: str | None
    started: float
    heard: float
    model: str | None


def command(
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            "--tracking",
            metavar="URI",
            help="MLflow server; default: MLFLOW_TRACKING_URI, else the embedded store.",
        ),
    ] = None,
    tracking_directory: Annotated[
        Path, typer.Option("--tracking-dir", metavar="DIR", help="Folder of the embedded store.")
    ] = Path("runs/mlflow"),
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="Only of this experiment; default: all.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Newest runs that are shown.")] = 30,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON list with all there is, for programs.")
    ] = False,
) -> None:
    """List runs: status, step, loss, age, data set and model. Stages stand below their recipe."""
    from training.config import TrackingConfig
    from training.tracking import tracking_uri as uri_of

    uri = uri_of(TrackingConfig(uri=tracking_uri, directory=str(tracking_directory)))
    rows = read_runs(uri, experiment, limit)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    if not rows:
        typer.echo(f"no runs in {uri}")
        return
    from rich.console import Console

    Console(highlight=False).print(table_of(rows, time.time()))


def read_runs(uri: str, experiment: str | None, limit: int) -> list[RunRow]:
    """The newest runs of a store, newest first.

    Raises:
        UserError: if the store cannot be read, or lacks the experiment.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.is_file():
        raise UserError(
            f"there is no MLflow store {file}; name yours with --tracking URI or --tracking-dir "
            "DIR, or train something first"
        )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        client = MlflowClient(tracking_uri=uri)
        names = {known.experiment_id: known.name for known in client.search_experiments()}
        if experiment is not None:
            names = {key: name for key, name in names.items() if name == experiment}
            if not names:
                raise UserError(f"{uri} has no experiment {experiment!r}; leave --experiment away")
        found = client.search_runs(
            list(names), order_by=["attributes.start_time DESC"], max_results=limit
        )
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MLflow store {uri} cannot be read: {reason}; start the server, or correct "
            "--tracking or MLFLOW_TRACKING_URI"
        ) from None
    return [_row(run, names[run.info.experiment_id]) for run in found]


def _row(run: Any, experiment: str) -> RunRow:
    tags, params = run.data.tags, run.data.params
    # Only the message form of a run tells the step of each metric's last value.
    metrics = list(run.to_proto().data.metrics)
    loss = next((metric for metric in metrics if metric.key == "loss"), None)
    started = run.info.start_time / 1000
    return RunRow(
        name=run.info.run_name,
        run_id=run.info.run_id,
        parent=tags.get("mlflow.parentRunId"),
        experiment=experiment,
        status=run.info.status.lower(),
        step=int(loss.step) if loss else None,
        steps=_whole_number(params.get("steps")),
        loss=loss.value if loss else None,
        dataset=tags.get("dataset"),
        started=started,
        heard=max([started, *(metric.timestamp / 1000 for metric in metrics)]),
        model=tags.get("model"),
    )


def _whole_number(text: str | None) -> int | None:
    """A parameter of a run, which need not be one of ours."""
    return int(text) if text is not None and text.isdecimal() else None


def table_of(rows: Sequence[RunRow], now: float) -> Any:
    """Runs as a table; stages of a recipe below it, in the order that they were begun."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("status")
    for heading in ("step", "loss", "age"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("data set", overflow="fold")
    table.add_column("model", overflow="fold")
    known = {row.run_id for row in rows}
    for row in rows:
        if row.parent in known:
            continue
        table.add_row(*_cells(row, now, ""))
        stages = [child for child in rows if child.parent == row.run_id]
        for child in sorted(stages, key=lambda stage: stage.started):
            table.add_row(*_cells(child, now, "  "))
    return table


def _cells(row: RunRow, now: float, indent: str) -> list[str]:
    status, silence = row.status, now - row.heard
    if status == "running" and row.step is not None and silence > SILENT_AFTER_S:
        status = f"running? silent for {format_duration(silence)}"
    step = "" if row.step is None else f"{row.step:,}"
    if row.steps is not None:
        step = f"{step or 0}/{row.steps:,}"
    return [
        f"{indent}{row.name}",
        status,
        step,
        "" if row.loss is None else f"{row.loss:.4f}",
        format_duration(now - row.started),
        _short(row.dataset),
        _short(row.model),
    ]


def _short(path: str | None) -> str:
    """A path as one would type it here."""
    if not path:
        return ""
    here = f"{Path.cwd()}{os.sep}"
    return path.removeprefix(here)


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
