"""MLflow that is away: nothing is lost, nothing waits, and a run goes on."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from latent_dataset import write_dataset
from training_runs import losses, train

from streamdit.errors import UserError
from training.config import TrackingConfig
from training.outbox import Outbox, Unreachable
from training.run import Run
from training.tracking import Tracker, git_revision


class Server:
    """Takes records, or is away."""

    def __init__(self):
        self.got, self.away, self.attempts = [], False, 0

    def send(self, calls):
        self.attempts += 1
        if self.away:
            raise Unreachable("nobody answers")
        self.got.append(calls[0]["n"])
        return 1


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_records_arrive_in_order_and_leave_no_file(tmp_path):
    server = Server()
    outbox = Outbox(server.send, tmp_path / "outbox.jsonl")
    for n in range(50):
        outbox.put({"n": n})
    assert outbox.close() == 0
    assert server.got == list(range(50))
    assert not (tmp_path / "outbox.jsonl").exists()


def test_records_wait_in_a_file_while_the_server_is_away_and_follow_when_it_is_back(
    tmp_path, caplog
):
    server, path = Server(), tmp_path / "outbox.jsonl"
    outbox = Outbox(server.send, path, retry_after_s=0.02)
    outbox.put({"n": 0})
    wait_for(lambda: server.got == [0])
    server.away = True
    for n in range(1, 4):
        outbox.put({"n": n})
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) == 3)
    wait_for(lambda: server.attempts > 5)
    assert caplog.text.count("nobody answers") == 1
    server.away = False
    wait_for(lambda: server.got == [0, 1, 2, 3])
    outbox.put({"n": 4})
    assert outbox.close() == 0
    assert server.got == [0, 1, 2, 3, 4]
    assert caplog.text.count("the server is back") == 1
    assert not path.exists()


def test_what_one_process_could_not_send_the_next_one_sends(tmp_path):
    server, path = Server(), tmp_path / "outbox.jsonl"
    server.away = True
    first = Outbox(server.send, path, retry_after_s=0.01)
    first.put({"n": 1})
    first.put({"n": 2})
    assert first.close(wait_s=0.1) == 2
    with path.open("a") as file:
        file.write('{"n": 3, "cut')
    server.away = False
    second = Outbox(server.send, path)
    second.put({"n": 4})
    assert second.close() == 0
    assert server.got == [1, 2, 4]


def test_putting_never_waits_for_a_slow_server():
    release = threading.Event()

    def slow(calls):
        release.wait(10)
        return len(calls)

    outbox = Outbox(slow)
    started = time.perf_counter()
    for n in range(1000):
        outbox.put({"n": n})
    assert time.perf_counter() - started < 1.0
    release.set()
    assert outbox.close() == 0


def test_metrics_of_many_steps_travel_together(tmp_path):
    tracker = Tracker.start(TrackingConfig(directory=str(tmp_path)), "run")
    requests = []
    log_batch = tracker.client.log_batch

    def counting(run_id, **values):
        requests.append(len(values["metrics"]))
        time.sleep(0.05)
        log_batch(run_id, **values)

    tracker.client.log_batch = counting
    for step in range(600):
        tracker.log(step, {"loss": step / 2, "rate": 1.0})
    tracker.finish()
    assert sum(requests) == 1200
    assert max(requests) <= 1000
    assert len(requests) < 10
    history = tracker.client.get_metric_history(tracker.run_id, "loss")
    assert {metric.step: metric.value for metric in history} == {n: n / 2 for n in range(600)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_revision_is_that_of_the_own_checkout_or_none(tmp_path, monkeypatch):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init"], ["commit", "--allow-empty", "--message=first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    for folder, found in (("training", True), ("env/lib/training", False)):  # the latter: installed
        monkeypatch.setattr("training.tracking.__file__", str(tmp_path / folder / "tracking.py"))
        (tmp_path / folder).mkdir(parents=True)
        assert (git_revision() is not None) == found
    monkeypatch.setattr("training.tracking.__file__", str(tmp_path / "training" / "tracking.py"))
    monkeypatch.setenv("PATH", "")  # as in an image without git
    assert git_revision() is None


def test_an_unreachable_store_is_one_line_before_the_run_starts(tmp_path):
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"MLflow store {uri} cannot be used") as caught:
        Tracker.start(TrackingConfig(uri=uri), "run")
    assert "\n" not in str(caught.value)
    assert "start the server, or correct tracking.uri" in str(caught.value)


def serve(folder, port):
    """A real MLflow server; returns its process once it answers."""
    import requests

    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/store.db", "--workers", "1"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
    )

    def answers():
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
        except requests.RequestException:
            return False

    wait_for(answers, 120)
    return process


def kill(process):
    os.killpg(process.pid, 9)
    process.wait()


@pytest.mark.slow
def test_a_run_outlives_its_tracking_server_and_catches_up(tmp_path, monkeypatch):
    """The server is killed at step 2 and back at step 5; a resumed run starts without it."""
    from mlflow import MlflowClient

    dataset = write_dataset(tmp_path / "dataset")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("training.outbox.RETRY_AFTER_S", 0.2)
    monkeypatch.setattr("training.outbox.CLOSE_WAIT_S", 120.0)
    servers = [serve(tmp_path, port)]
    train_step = Run._train_step

    def outage(run, batches, stop):
        if run.step == 2 and len(servers) == 1:
            kill(servers[0])
        if run.step == 5:
            servers.append(serve(tmp_path, port))
        return train_step(run, batches, stop)

    monkeypatch.setattr(Run, "_train_step", outage)
    out = tmp_path / "out"
    options = {"tracking": {"uri": uri}}
    try:
        train(dataset, out, crash_at=4, **options)  # leaves records behind in its file
        kept = [json.loads(line) for line in (out / "mlflow-outbox.jsonl").open()]
        assert any(call["kind"] == "metrics" for call in kept)
        train(dataset, out, **options)
        assert len(servers) == 2
        run_id = json.loads((out / "mlflow-run.json").read_text())["run_id"]
        client = MlflowClient(uri)
        found = client.get_run(run_id)
        assert found.info.status == "FINISHED"
        history = client.get_metric_history(run_id, "loss")
        assert {metric.step: metric.value for metric in history} == losses(out)
        artifacts = {item.path for item in client.list_artifacts(run_id, "model")}
        assert "model/model.safetensors" in artifacts
        assert not (out / "mlflow-outbox.jsonl").exists()
    finally:
        for server in servers:
            if server.poll() is None:
                kill(server)
