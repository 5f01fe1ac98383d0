"""MLflow runs that could not be made when the training began."""

import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from latent_dataset import write_dataset
from outbox_server import wait_for
from training_runs import tiny_job

from streamdit.errors import UserError
from training import tracking
from training.config import TrackingConfig
from training.loop import train_loop
from training.records import Records, known_run, outbox_path, send_left
from training.tracking import Tracker


@pytest.fixture
def store_away(monkeypatch):
    """A store that cannot be reached until the list is emptied."""
    reasons, connect_at_once = ["away"], tracking.connect

    def connect_when_back(config):
        if reasons:
            raise UserError("MLflow store cannot be used")
        return connect_at_once(config)

    monkeypatch.setattr(tracking, "connect", connect_when_back)
    monkeypatch.setattr("training.outbox.RETRY_AFTER_S", 0.05)
    return reasons


def test_a_run_that_cannot_be_made_at_once_is_made_when_the_store_is_back(tmp_path, store_away):
    """As that of a recipe's later stage; its time is that of its beginning."""
    config, made = TrackingConfig(directory=str(tmp_path)), []
    with pytest.raises(UserError, match="cannot be used"):
        Tracker.start(config, "stage")
    before = int(time.time() * 1000)
    tracker = Tracker.start(
        config,
        "stage",
        params={"steps": 3},
        tags={"recipe": "paper"},
        outbox=tmp_path / "outbox.jsonl",
        on_made=made.append,
        may_be_away=True,
    )
    began = int(time.time() * 1000)
    tracker.log(1, {"loss": 0.5})
    tracker.artifact(Path(__file__))
    wait_for((tmp_path / "outbox.jsonl").exists)
    assert (tracker.run_id, made) == (None, [])
    store_away.clear()
    tracker.finish()
    assert made == [tracker.run_id]
    found = tracker.client.get_run(tracker.run_id)
    assert (found.info.run_name, found.info.status) == ("stage", "FINISHED")
    assert before <= found.info.start_time <= began
    assert found.data.params == {"steps": "3"}
    assert found.data.tags["recipe"] == "paper"
    assert found.data.metrics == {"loss": 0.5}
    assert [item.path for item in tracker.client.list_artifacts(tracker.run_id)] == [
        Path(__file__).name
    ]


def test_what_a_run_left_that_could_never_be_made_is_sent_with_its_tags(
    tmp_path, store_away, monkeypatch
):
    monkeypatch.setattr("training.outbox.CLOSE_WAIT_S", 0.1)
    config, outbox, made = TrackingConfig(directory=str(tmp_path)), tmp_path / "outbox.jsonl", []
    options = {"params": {"steps": 3}, "tags": {"recipe": "paper"}}
    tracker = Tracker.start(config, "stage", **options, outbox=outbox, may_be_away=True)
    tracker.log(1, {"loss": 0.5})
    tracker.finish()
    assert tracker.run_id is None
    store_away.clear()
    assert Tracker.take_up(config, "stage", None, outbox, made.append).leave() == 0
    found = tracker.client.get_run(made[0])
    assert (found.info.run_name, found.info.status) == ("stage", "FINISHED")
    assert (found.data.params, found.data.metrics) == ({"steps": "3"}, {"loss": 0.5})
    assert found.data.tags["recipe"] == "paper"


def test_a_run_whose_first_attempt_was_stopped_unrecorded_is_running_again(
    tmp_path, store_away, monkeypatch
):
    monkeypatch.setattr("training.outbox.CLOSE_WAIT_S", 0.1)
    config, outbox = TrackingConfig(directory=str(tmp_path)), tmp_path / "outbox.jsonl"
    began = 1_700_000_000_000
    options = {"outbox": outbox, "may_be_away": True, "began_ms": began}
    Tracker.start(config, "stage", **options).finish("KILLED")
    again = Tracker.start(config, "stage", **options)
    store_away.clear()
    again.log(2, {"loss": 0.25})
    assert again.leave() == 0
    found = again.client.get_run(again.run_id)
    assert (found.info.status, found.info.start_time) == ("RUNNING", began)


def test_a_store_that_takes_no_run_is_one_line_and_no_run_is_made_twice(tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr("training.outbox.RETRY_AFTER_S", 0.05)
    config, refusals, told = TrackingConfig(directory=str(tmp_path)), ["full"], []
    create_run = MlflowClient.create_run

    def create(*arguments, **options):
        if refusals:
            raise MlflowException("the database is full")
        return create_run(*arguments, **options)

    def tell(run_id):
        told.append(run_id)
        if len(told) == 1:
            raise OSError("the disk is full")

    monkeypatch.setattr(MlflowClient, "create_run", create)
    with pytest.raises(UserError, match="takes no run: the database is full"):
        Tracker.start(config, "stage")
    tracker = Tracker.start(config, "stage", may_be_away=True, on_made=tell)
    refusals.clear()
    tracker.finish()
    assert told == [tracker.run_id] * 2
    experiment = tracker.client.get_run(tracker.run_id).info.experiment_id
    assert len(tracker.client.search_runs([experiment])) == 1


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


def late_job(dataset_dir, tmp_path):
    """A job that may begin while its store is away."""
    store = {"directory": str(tmp_path / "mlflow"), "system_every_s": 0.05}
    return replace(tiny_job(dataset_dir, tmp_path / "out", tracking=store), store_may_be_away=True)


def late_training(job, monkeypatch, on_step):
    """A training whose store is away when it begins; `on_step` is told the steps it writes."""
    write = Records.write

    def told(records, step, figures):
        write(records, step, figures)
        on_step(step)

    monkeypatch.setattr(Records, "write", told)
    monkeypatch.setattr("training.outbox.CLOSE_WAIT_S", 1.0)
    train_loop(job)


def found_run(job, tmp_path):
    """The one run of the store, which is the job's, and its samples of the machine."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(job.config.tracking.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == known_run(job).run_id
    name = f"system/{socket.gethostname()}/system_memory_usage_percentage"
    return run, client.get_metric_history(run.info.run_id, name)


def test_machines_are_watched_from_the_beginning_of_a_run_that_is_made_later(
    dataset_dir, tmp_path, monkeypatch, store_away
):
    def come_back(step):
        if step == 1:  # first there are samples without a run
            wait_for(outbox_path(job, socket.gethostname()).exists)
        if step == 5:
            store_away.clear()

    job = late_job(dataset_dir, tmp_path)
    late_training(job, monkeypatch, come_back)
    run, samples = found_run(job, tmp_path)
    assert run.info.status == "FINISHED"
    assert min(sample.step for sample in samples) < 5
    assert not list((tmp_path / "out").glob("mlflow-outbox*"))


def test_what_machines_left_of_a_run_that_was_never_made_joins_the_one_run(
    dataset_dir, tmp_path, monkeypatch, store_away
):
    job = late_job(dataset_dir, tmp_path)
    outbox = outbox_path(job, socket.gethostname())
    late_training(job, monkeypatch, lambda step: step > 1 or wait_for(outbox.exists))
    assert len(list((tmp_path / "out").glob("mlflow-outbox*"))) >= 2
    store_away.clear()
    assert send_left(job) == 0
    run, samples = found_run(job, tmp_path)
    assert run.info.status == "FINISHED"
    assert samples
    assert run.data.metrics["loss"] > 0
    assert not list((tmp_path / "out").glob("mlflow-outbox*"))
