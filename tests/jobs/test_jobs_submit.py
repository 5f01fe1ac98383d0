"""What `streamdit submit` sends, and what it refuses before anything is sent."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import cluster
from jobs.cli import app
from jobs.package import Package
from jobs.submit import Job, job_arguments, job_environment, revision_of
from streamdit.errors import UserError

PACKAGE = Package(Path("/work"), (Path("my.yaml"),), 1)


def words(job, *arguments, package=PACKAGE):
    return job_arguments(job, list(arguments), package)


def test_arguments_reach_the_job_as_they_are_and_runs_land_on_shared_storage():
    given = ("/mnt/data", "--out", "/mnt/runs/a", "--preset", "demo", "steps=3")
    assert words(Job.TRAIN, *given) == [*given, "tracking.directory=/mnt/runs/mlflow"]


def test_a_chosen_store_is_left_alone():
    given = ("/mnt/data", "--out", "/mnt/runs/a", "tracking.directory=/elsewhere")
    assert words(Job.TRAIN, *given) == list(given)
    given = ("/mnt/runs/a/model", "--tracking-dir", "/elsewhere")
    assert words(Job.REGISTER, *given) == list(given)


def test_registering_uses_the_store_that_training_used(tmp_path, capsys):
    assert words(Job.REGISTER, "/mnt/runs/a/model")[-2:] == ["--tracking-dir", "/mnt/runs/mlflow"]
    assert "registers in /mnt/runs/mlflow" in capsys.readouterr().err
    assert words(Job.REGISTER, "/model")[-1] == "/mlflow"
    run = tmp_path / "recipe" / "stage"
    run.mkdir(parents=True)
    record = {"run_id": "a", "tracking_uri": f"sqlite:///{tmp_path}/mlflow/mlflow.db"}
    (run / "mlflow-run.json").write_text(json.dumps(record))
    capsys.readouterr()
    found = words(Job.REGISTER, str(run / "model"))[-2:]
    assert found == ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow/mlflow.db"]
    assert capsys.readouterr().err == ""
    given = (str(run / "model"), "--tracking-uri", "http://mlflow:5000")
    assert words(Job.REGISTER, *given) == list(given)
    given = [str(run / "model")]
    assert job_arguments(Job.REGISTER, given, PACKAGE, has_store=True) == given


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("sqlite:///runs/mlflow.db", "a file of this machine"),
        ("sqlite:////home/me/mlflow.db", "a file of this machine"),
        ("file:///home/me/mlruns", "a file of this machine"),
        ("./mlruns", "a folder of this machine"),
        ("http://localhost:5000", "an address of this machine alone"),
        ("http://127.0.0.1:5000", "an address of this machine alone"),
        ("http://[::1]:5000", "an address of this machine alone"),
        ("postgresql://localhost/mlflow", "an address of this machine alone"),
    ],
)
def test_store_that_the_cluster_does_not_reach_goes_along_only_if_asked(uri, place, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError) as caught:
        job_environment([])
    assert str(caught.value).startswith(f"MLFLOW_TRACKING_URI {uri} is {place}")
    assert "--env MLFLOW_TRACKING_URI=http://HOST:5000" in str(caught.value)
    assert job_environment(["MLFLOW_TRACKING_URI"]) == {"MLFLOW_TRACKING_URI": uri}
    asked = job_environment(["MLFLOW_TRACKING_URI=http://mlflow:5000"])
    assert asked == {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}


@pytest.mark.parametrize(
    ("job", "given", "named"),
    [
        (Job.TRAIN, ("/d", "--out", "/o", "tracking.uri=http://localhost:5000"), "tracking.uri"),
        (Job.REGISTER, ("/m", "--tracking-uri", "http://localhost:5000"), "--tracking-uri"),
    ],
)
def test_server_of_this_machine_is_refused_in_settings_too(job, given, named):
    with pytest.raises(UserError, match=rf"^{named} http://localhost:5000 is an address of this"):
        words(job, *given)


def test_databricks_is_a_store_that_the_cluster_reaches(monkeypatch):
    for uri in ("databricks", "databricks://profile"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert job_environment([]) == {"MLFLOW_TRACKING_URI": uri}


@pytest.mark.parametrize(
    ("job", "arguments", "named"),
    [
        (Job.TRAIN, ("/mnt/data",), "--out runs/train"),
        (Job.TRAIN, ("data", "--out", "/mnt/a"), "dataset data"),
        (Job.TRAIN, ("/mnt/data", "--out", "/mnt/a", "--from", "b"), "--from b"),
        (
            Job.TRAIN,
            ("/mnt/d", "--out", "/mnt/a", "--recipe", "demo", "--data", "hq=d"),
            "--data d",
        ),
        (Job.DISTILL, ("/mnt/data", "--out", "/mnt/a"), "--teacher runs/train/model"),
        (
            Job.DISTILL,
            ("/mnt/d", "--out", "/mnt/a", "--teacher", "/mnt/t", "--rollouts", "r"),
            "--rollouts r",
        ),
        (
            Job.DISTILL,
            ("/mnt/d", "--out", "/mnt/a", "--teacher", "/mnt/t", "rollouts=r"),
            "rollouts r",
        ),
        (
            Job.TRAIN,
            ("/d", "--out", "/o", "tracking.directory=runs/m"),
            "tracking.directory runs/m",
        ),
        (Job.REGISTER, ("model",), "model model"),
        (Job.REGISTER, ("/m", "--tracking-dir", "runs/mlflow"), "--tracking-dir runs/mlflow"),
        (Job.INGEST, ("videos", "--out", "/mnt/data"), "the input videos"),
        (Job.INGEST, ("/mnt/videos", "clip.frames=8"), "--out data"),
    ],
)
def test_relative_path_is_refused_by_name(job, arguments, named):
    with pytest.raises(UserError) as caught:
        words(job, *arguments)
    assert str(caught.value).startswith(f"{named} is relative")
    assert "absolute path on storage that every node reads" in str(caught.value)


def test_addresses_of_a_store_and_names_of_a_hub_are_no_relative_paths():
    given = ("s3://bucket/videos", "--out", "/mnt/data", "--autoencoder", "org/wan-vae")
    assert words(Job.INGEST, *given) == list(given)


def test_settings_are_named_as_the_job_finds_them(tmp_path, monkeypatch):
    root = tmp_path / "work"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "my.yaml").write_text("steps: 3\n")
    package = Package(root, (Path("sub/my.yaml"),), 9)
    monkeypatch.chdir(root / "sub")
    for given in (("--config", "my.yaml"), (f"--config={root}/sub/my.yaml",)):
        sent = words(Job.TRAIN, "/mnt/data", "--out", "/mnt/a", *given, package=package)
        assert "sub/my.yaml" in " ".join(sent).replace("=", " ").split()
    sent = words(Job.TRAIN, "/mnt/data", "--out", "/mnt/a", "--recipe", "my.yaml", package=package)
    assert "sub/my.yaml" in sent
    with pytest.raises(UserError, match="does not go along"):
        words(
            Job.TRAIN,
            *("/mnt/data", "--out", "/mnt/a", "--config", "my.yaml"),
            package=Package(root, (), 0),
        )


def test_environment_is_what_is_asked_for_and_the_store_without_secrets(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert job_environment(["NCCL_DEBUG", "A=b=c"]) == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "NCCL_DEBUG": "INFO",
        "A": "b=c",
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hush@db/mlflow")
    assert job_environment([]) == {}
    with pytest.raises(UserError, match="NOWHERE: it is not set here"):
        job_environment(["NOWHERE"])


def test_revision_of_the_code_goes_along_where_the_code_does(tmp_path):
    """The package has no repository in it, and what a cluster has installed may be other code."""
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init"], ["commit", "--allow-empty", "--message=first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    code = Package(tmp_path, (Path("training/revision.py"),), 1)
    assert revision_of(code) == {"STREAMDIT_GIT_REVISION": head.stdout.strip()}
    assert revision_of(Package(tmp_path, (Path("settings.yaml"),), 1)) == {}
    assert revision_of(Package(tmp_path / "elsewhere", code.files, 1)) == {}


@pytest.mark.parametrize(("options", "gpus"), [([], None), (["--gpus", "1"], 1.0)])
def test_command_holds_only_the_resources_that_are_asked_for(options, gpus, tmp_path, monkeypatch):
    sent = []

    class Client:
        def submit_job(self, **arguments):
            sent.append(arguments)
            return "raysubmit_1"

        def get_address(self):
            return "http://head:8265"

    monkeypatch.setattr("jobs.submit.connect", lambda address: Client())
    arguments = ["register", "/mnt/runs/a/model", "--name", "mine", "--working-dir", str(tmp_path)]
    result = CliRunner().invoke(app, ["submit", *arguments, *options, "--no-wait"])
    assert result.exit_code == 0, result.output
    (job,) = sent
    assert job["entrypoint"].startswith("python -m jobs.register /mnt/runs/a/model --name mine")
    assert "--gpus" not in job["entrypoint"]
    assert (job["entrypoint_num_gpus"], job["entrypoint_num_cpus"]) == (gpus, None)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (None, "no cluster is named"),
        ("http://127.0.0.1:1", "does not answer (Connection refused)"),
        ("ray://head:10001", "is not the address of a job server"),
        ("http://head:port", "does not answer"),
    ],
)
def test_cluster_that_is_not_there_is_one_line_at_once(address, reason, monkeypatch):
    monkeypatch.delenv(cluster.ADDRESS_VARIABLE, raising=False)
    started = time.monotonic()
    option = ["--address", address] if address else []
    for arguments in (["jobs", "list"], ["submit", "train", "/d", "--out", "/o"]):
        result = CliRunner().invoke(app, [*arguments, *option])
        assert result.exit_code == 2, result.output
        assert reason in result.output
        assert len(result.output.strip().splitlines()) == 1
    assert time.monotonic() - started < 4 * cluster.CONNECT_TIMEOUT_S


def test_server_that_is_no_job_server_is_told_apart(monkeypatch):
    import http.server
    import threading

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Ray's own client would go to the address in the environment instead.
    unused = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{unused.getsockname()[1]}")
    try:
        with pytest.raises(UserError, match="is not a Ray job server"):
            cluster.connect(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        unused.close()
    assert os.environ["RAY_ADDRESS"].startswith("http://127.0.0.1")
