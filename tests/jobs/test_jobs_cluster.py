"""The four jobs on a Ray cluster through its job server, as a laptop submits them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from latent_dataset import tiny_autoencoder, train_settings, write_dataset
from mlflow import MlflowClient
from mlflow_server import mlflow_server, s3_client
from processes import started
from ray_head import ray_head

import streamdit
from evaluation.sprites import SpriteWorldConfig, make_world
from streamdit.io import read_model_config

ROOT = Path(__file__).parents[2]
PACKAGES = ("streamdit", "pipeline", "training", "distillation", "evaluation", "jobs", "configs")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("head")) as address:
        yield address


@pytest.fixture
def work(tmp_path):
    """A working directory with the code, and settings that make every job small."""
    folder = tmp_path / "work"
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    ingest = {
        "clip": {"frames": 16, "fps": 16.0, "height": 32, "width": 32, "stride_frames": 16},
        "text_encoders": [{"name": "bytes", "kind": "bytes", "width": 16, "max_tokens": 16}],
    }
    train = train_settings(steps=4, validation={"every": 4, "samples": 2})
    distill = {
        "teacher": {"chunk_frames": 1, "micro_steps": 2, "guidance_scale": 2.0},
        "steps": 2,
        "global_batch": 4,
        "precision": "float32",
        "launch": {"workers": 1, "use_gpu": False, "cpus_per_worker": 1},
    }
    for name, settings in (("ingest", ingest), ("train", train), ("distill", distill)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def start(head, folder, *words, **environment):
    return started(
        *(sys.executable, "-m", "jobs.cli", *words),
        cwd=folder,
        env={
            **os.environ,
            "RAY_API_SERVER_ADDRESS": head,
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(folder),
            "COLUMNS": "200",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def streamdit_command(head, folder, *words, **environment):
    with start(head, folder, *words, **environment) as process:
        said, _ = process.communicate(timeout=600)
        return process.returncode, said


def submitted(said):
    return re.search(r"submitted (\S+):", said).group(1)


def run(head, work, *words):
    """Submit a job that has to succeed; returns what was said."""
    status, said = streamdit_command(head, work, "submit", *words)
    assert status == 0, said
    assert "succeeded" in said.splitlines()[-1]
    return said


def test_four_jobs_in_sequence_end_in_a_model_that_is_loaded_by_alias(
    head, work, tmp_path, monkeypatch
):
    shared = tmp_path / "shared"
    make_world(shared / "videos", SpriteWorldConfig(videos=3, shots_per_video=3, size=32))
    tiny_autoencoder(shared / "autoencoder")
    store = f"sqlite:///{shared}/mlflow/mlflow.db"

    said = run(
        *(head, work, "ingest", shared / "videos", "--out", shared / "data", "--preset", "demo"),
        *("--config", "ingest.yaml", "--autoencoder", shared / "autoencoder"),
    )
    assert "selected" in said, "the job's own summary is followed"
    run(
        *(head, work, "train", shared / "data", "--out", shared / "teacher", "--preset", "demo"),
        *("--config", "train.yaml", "launch.workers=1"),
    )
    run(
        *(head, work, "distill", shared / "data", "--teacher", shared / "teacher/model"),
        *("--out", shared / "student", "--preset", "demo", "--config", "distill.yaml"),
    )
    words = ("--name", "from-cluster", "--alias", "production")
    run(head, work, "register", shared / "student/model", *words)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    model = streamdit.load("models:/from-cluster@production")
    assert model.scheme().s == 1
    assert next(model.stream("a red circle")).frames.shape[-1] == 3

    status, listed = streamdit_command(head, work, "jobs", "list", "--json")
    jobs = json.loads(listed)
    assert status == 0
    commands = [job["entrypoint"].split()[2] for job in jobs[:4]]
    assert commands == ["jobs.register", "jobs.distill", "jobs.train", "jobs.ingest"]
    assert {job["status"] for job in jobs[:4]} == {"SUCCEEDED"}


def test_jobs_track_and_register_through_the_server_of_a_team(head, work, tmp_path, monkeypatch):
    """An MLflow server on PostgreSQL, with artifacts in an S3 store that jobs have no keys of."""
    dataset, out = write_dataset(tmp_path / "data"), tmp_path / "run"
    with mlflow_server(tmp_path) as (address, store):
        tracked = ("--env", f"MLFLOW_TRACKING_URI={address}")
        words = ("--preset", "demo", "--config", "train.yaml", "launch.workers=1")
        run(head, work, "train", *tracked, dataset, "--out", out, *words)
        words = ("--name", "of-the-team", "--alias", "production")
        run(head, work, "register", *tracked, out / "model", *words)

        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        loaded = streamdit.load("models:/of-the-team@production")
        assert loaded.config.weights_sha256 == read_model_config(out / "model").weights_sha256
        client = MlflowClient(address)
        tracked_run = client.get_run(loaded.config.lineage["run_id"])
        assert tracked_run.info.status == "FINISHED"
        losses = client.get_metric_history(tracked_run.info.run_id, "loss")
        assert [metric.step for metric in losses] == [1, 2, 3, 4]
        kept = s3_client(store).list_objects_v2(Bucket="mlflow")["Contents"]
        assert any(entry["Key"].endswith("model.safetensors") for entry in kept)


def test_failed_job_has_its_own_exit_status_and_message(head, work, tmp_path):
    status, said = streamdit_command(
        head, work, "submit", "train", tmp_path / "nothing", "--out", tmp_path / "run"
    )
    assert status == 2
    assert f"error: dataset {tmp_path}/nothing does not exist" in said
    assert said.splitlines()[-1].endswith("failed")
    status, logs = streamdit_command(head, work, "jobs", "logs", submitted(said))
    assert status == 0
    assert "does not exist" in logs


def read_until_it_works(process):
    """What a command shows of a job's log up to the job's own word."""
    lines = []
    while not lines or lines[-1] != "working\n":
        lines.append(process.stdout.readline())
        assert lines[-1] or process.poll() is None, lines
    return "".join(lines)


def test_letting_go_leaves_the_job_running_until_it_is_stopped(head, work):
    (work / "jobs" / "train.py").write_text(
        "import time\n"
        "def command(dataset: str, out: str = '/o'): ...\n"
        "if __name__ == '__main__':\n"
        "    print('working', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with start(head, work, "submit", "train", "/data", "--out", "/mnt/out") as process:
        job = submitted(read_until_it_works(process))
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"streamdit jobs stop {job}" in said
    assert "Traceback" not in said

    def state():
        _, listed = streamdit_command(head, work, "jobs", "list", "--json")
        return next(found["status"] for found in json.loads(listed) if found["id"] == job)

    assert state() == "RUNNING"
    with start(head, work, "jobs", "logs", job, "--follow") as follower:
        read_until_it_works(follower)
        status, said = streamdit_command(head, work, "jobs", "stop", job)
        assert (status, said.strip()) == (0, f"{job} is stopped")
        assert state() == "STOPPED"
        said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert said.splitlines()[-1] == f"{job} stopped"
    status, said = streamdit_command(head, work, "jobs", "stop", job)
    assert (status, said.strip()) == (0, f"{job} had ended already: stopped")


def test_unknown_job_is_one_line(head, work):
    for words in (["logs", "nope"], ["stop", "nope"], ["logs", "nope", "--follow"]):
        status, said = streamdit_command(head, work, "jobs", *words)
        assert status == 2
        assert said.startswith("error: job nope does not exist")
        assert len(said.strip().splitlines()) == 1
