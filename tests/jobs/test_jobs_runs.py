"""The table of runs, from a store that real runs wrote."""

import json
import re
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.runs import RunRow, read_runs, table_of
from training.config import TrackingConfig
from training.tracking import Tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A recipe with two stages, and a run that failed, in a store of their own."""
    folder = tmp_path_factory.mktemp("mlflow")
    config = TrackingConfig(directory=str(folder))
    recipe = Tracker.start(config, "paper", params={"stages": "t2v, quality"})
    below = {"mlflow.parentRunId": recipe.run_id, "dataset": "/data/best"}
    for name, steps in (("t2v", 20), ("quality", 30)):
        stage = Tracker.start(config, name, params={"steps": steps}, tags=below)
        stage.log(10, {"loss": 0.5, "samples_per_s": 3.0})
        stage.log(20, {"loss": 0.25})
        if name == "t2v":
            stage.tag("model", "/runs/t2v/model")
            stage.finish()
    failed = Tracker.start(config, "broken", params={"steps": 5}, tags={"dataset": "/data/other"})
    failed.finish("FAILED")
    return folder


def runs(*arguments):
    return CliRunner().invoke(app, ["runs", *map(str, arguments)], prog_name="streamdit")


def test_json_has_every_run_with_its_last_step_and_loss(store):
    result = runs("--tracking-dir", store, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert sorted(rows) == ["broken", "paper", "quality", "t2v"]
    one = rows["t2v"]
    assert (one["status"], one["step"], one["steps"], one["loss"]) == ("finished", 20, 20, 0.25)
    assert (one["dataset"], one["model"]) == ("/data/best", "/runs/t2v/model")
    assert one["parent"] == rows["paper"]["run_id"]
    assert (rows["quality"]["status"], rows["quality"]["model"]) == ("running", None)
    assert (rows["broken"]["status"], rows["broken"]["step"]) == ("failed", None)
    assert all(0 <= row["heard"] - row["started"] < 600 for row in rows.values())


def test_table_puts_stages_below_their_recipe(store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    result = runs("--tracking", f"sqlite:///{store}/mlflow.db")
    assert result.exit_code == 0, result.output
    lines = [re.split(r"\s{2,}", line.rstrip()) for line in result.stdout.splitlines()]
    assert lines[0] == ["run", "status", "step", "loss", "age", "data set", "model"]
    order = [line[0] or f"  {line[1]}" for line in lines[1:]]
    assert order == ["broken", "paper", "  t2v", "  quality"]
    assert lines[3][2:5] == ["finished", "20/20", "0.2500"]
    assert lines[4][2:5] == ["running", "20/30", "0.2500"]
    assert lines[1][1:3] == ["failed", "0/5"]


def test_newest_runs_come_first_and_others_can_be_left_out(store):
    newest = read_runs(f"sqlite:///{store}/mlflow.db", None, limit=1)
    assert [row.name for row in newest] == ["broken"]
    result = runs("--tracking-dir", store, "--experiment", "nonsense")
    assert result.exit_code == 2
    assert "has no experiment 'nonsense'" in result.stderr


def test_run_that_has_gone_silent_is_marked():
    row = RunRow("r", "1", None, "e", "running", 3, 9, 0.5, None, 1000.0, 2000.0, None)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(table_of([row], now=2000.0 + 3720))
    assert "running? silent for 1 h 02 min" in shown.get()


def test_store_that_is_not_there_is_told_in_one_line_within_seconds(tmp_path):
    result = runs("--tracking-dir", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: there is no MLflow store {tmp_path}/mlflow.db; ")
    assert not list(tmp_path.iterdir()), "looking must not make a store"
    started = time.monotonic()
    result = runs("--tracking", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "MLflow store http://127.0.0.1:9 cannot be read" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert time.monotonic() - started < 15
