"""MLflow that is away: nothing is lost, nothing waits, and a run goes on."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from latent_dataset import write_dataset
from outbox_server import wait_for
from processes import kill_tree
from training_runs import losses, train

from streamdit.errors import UserError
from training.config import TrackingConfig
from training.revision import git_revision
from training.run import Run
from training.tracking import Tracker, _is_permanent, connect


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


def open_run(folder, artifact_location, outbox=None):
    """A run whose figures are taken and whose artifacts go elsewhere."""
    config = TrackingConfig(directory=str(folder / "mlflow"))
    client, _ = connect(config)
    client.create_experiment("elsewhere", artifact_location=artifact_location)
    return Tracker.start(
        config.model_copy(update={"experiment": "elsewhere"}), "run", outbox=outbox
    )


def test_an_artifact_store_out_of_reach_holds_up_no_figures_and_is_sent_to_later(
    tmp_path, s3, monkeypatch, caplog
):
    """S3's errors are those of a library of its own; here the bucket is missing."""
    monkeypatch.setattr("training.outbox.RETRY_AFTER_S", 0.05)
    monkeypatch.setattr("training.outbox.CLOSE_WAIT_S", 0.2)
    made = tmp_path / "made.txt"
    made.write_text("made")
    waiting = tmp_path / "outbox.artifacts.jsonl"
    tracker = open_run(tmp_path, "s3://later/runs", tmp_path / "outbox.jsonl")
    tracker.artifact(made)
    wait_for(waiting.exists)
    tracker.log(1, {"loss": 0.5})
    tracker.tag("checkpoint", "here")
    tracker.finish()
    assert "NoSuchBucket" in caplog.text
    assert "2 records could not be sent" in caplog.text
    found = tracker.client.get_run(tracker.run_id)
    assert (found.data.metrics, found.info.status) == ({"loss": 0.5}, "RUNNING")
    assert found.data.tags["checkpoint"] == "here"
    kinds = [json.loads(line)["kind"] for line in waiting.open()]
    assert kinds == ["artifact", "status"]

    s3.create_bucket(Bucket="later")
    assert Tracker(tracker.client, tracker.run_id, tmp_path / "outbox.jsonl").leave() == 0
    (kept,) = s3.list_objects_v2(Bucket="later")["Contents"]
    assert kept["Key"].endswith("/artifacts/made.txt")
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert not waiting.exists()


def test_artifacts_that_their_store_refuses_are_dropped_by_name(tmp_path, caplog):
    answers = iter((403, 413))

    class Refusing(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(next(answers))

        def log_message(self, *args):
            pass

    made = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path in made:
        path.write_text("made")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracker = open_run(tmp_path, f"http://127.0.0.1:{server.server_port}/store")
        for path in made:
            tracker.artifact(path)
        tracker.finish()
        server.shutdown()
    for path in made:
        assert f"MLflow refuses artifact {path}, dropped" in caplog.text
    assert list(answers) == []
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"


def s3_error(code):
    """As boto3's upload raises it."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import ClientError

    metadata = {"HTTPStatusCode": 403}
    refused = ClientError({"Error": {"Code": code}, "ResponseMetadata": metadata}, "PutObject")
    failed = S3UploadFailedError("upload failed")
    failed.__context__ = refused
    return failed


def test_answer_to_a_large_artifact_is_waited_for_as_long_as_a_store_may_take(
    tmp_path, monkeypatch
):
    tracker, seen = open_run(tmp_path, tmp_path.as_uri()), []
    small, large = tmp_path / "small", tmp_path / "model" / "large"
    small.write_text("x")
    large.parent.mkdir()
    with large.open("wb") as file:
        file.truncate(16_000_000_000)

    def upload(run_id, path, folder):
        seen.append(int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))

    monkeypatch.setattr(tracker.client, "log_artifact", upload)
    monkeypatch.setattr(tracker.client, "log_artifacts", upload)
    tracker.artifact(small)
    tracker.artifact(large.parent)
    tracker.finish()
    assert seen == [10, 10 + 3200]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def test_what_may_pass_is_told_from_what_stays_refused():
    import requests
    from mlflow.exceptions import MlflowException, RestException

    def http(status):
        response = requests.Response()
        response.status_code = status
        return requests.HTTPError(response=response)

    kept = [http(status) for status in (401, 404, 408, 429, 500, 503)]
    kept += [MlflowException("no route"), OSError("reset"), requests.ConnectionError("refused")]
    for code in ("ExpiredToken", "RequestTimeTooSkewed", "InvalidAccessKeyId"):
        kept.append(s3_error(code))
    dropped = [
        s3_error("NoSuchBucket"),
        s3_error("AccessDenied"),
        http(400),
        http(403),
        http(413),
        FileNotFoundError("gone"),
    ]
    dropped += [RestException({"error_code": "RESOURCE_DOES_NOT_EXIST"})]
    assert [_is_permanent(error) for error in kept] == [False] * len(kept)
    assert [_is_permanent(error) for error in dropped] == [True] * len(dropped)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_revision_is_that_of_the_own_checkout_or_none(tmp_path, monkeypatch):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init"], ["commit", "--allow-empty", "--message=first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    for folder, found in (("training", True), ("env/lib/training", False)):  # the latter: installed
        monkeypatch.setattr("training.revision.__file__", str(tmp_path / folder / "tracking.py"))
        (tmp_path / folder).mkdir(parents=True)
        assert (git_revision() is not None) == found
    monkeypatch.setattr("training.revision.__file__", str(tmp_path / "training" / "tracking.py"))
    first = git_revision()
    monkeypatch.setenv("STREAMDIT_GIT_REVISION", "of what was sent")  # as `streamdit submit` does
    assert git_revision() == "of what was sent"
    assert git_revision(tmp_path) == first
    monkeypatch.delenv("STREAMDIT_GIT_REVISION")
    monkeypatch.setenv("PATH", "")  # as in an image without git
    assert git_revision() is None


def test_an_experiment_that_another_client_makes_meanwhile_is_taken(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    config = TrackingConfig(directory=str(tmp_path), experiment="shared")
    _, first = connect(config)
    look, answers = MlflowClient.get_experiment_by_name, []

    def too_early(client, name):
        answers.append(look(client, name) if answers else None)
        return answers[-1]

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", too_early)
    assert connect(config)[1] == first
    assert len(answers) == 2


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

    try:
        wait_for(answers, 120)
    except BaseException:
        kill_tree(process)
        raise
    return process


@pytest.mark.slow
def test_a_run_outlives_its_tracking_server_and_catches_up(tmp_path, monkeypatch):
    """The server is killed at step 2 and back at step 5; a resumed run starts without it."""
    from mlflow import MlflowClient

    dataset = write_dataset(tmp_path / "dataset")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("training.outbox.RETRY_AFTER_S", 0.2)
    servers = [serve(tmp_path, port)]
    train_step = Run._train_step

    def outage(run, batches, stop):
        if run.step == 2 and len(servers) == 1:
            kill_tree(servers[0])
        if run.step == 5:
            servers.append(serve(tmp_path, port))
        return train_step(run, batches, stop)

    monkeypatch.setattr(Run, "_train_step", outage)
    out = tmp_path / "out"
    options = {"tracking": {"uri": uri}}
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr("training.outbox.CLOSE_WAIT_S", 1.0)
            train(dataset, out, crash_at=4, **options)  # leaves records behind in its file
        kept = [json.loads(line) for line in next(out.glob("mlflow-outbox-*.jsonl")).open()]
        assert any(call["kind"] == "metrics" for call in kept)
        monkeypatch.setattr("training.outbox.CLOSE_WAIT_S", 120.0)
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
        assert not list(out.glob("mlflow-outbox*"))
    finally:
        for server in servers:
            if server.poll() is None:
                kill_tree(server)
