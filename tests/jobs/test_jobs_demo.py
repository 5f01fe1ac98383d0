"""The whole path through the command line on Ray: interrupted, continued, and done once only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import started

import streamdit
from evaluation.sheets import read_video
from pipeline.schema import load_manifest

ROOT = Path(__file__).parents[2]
SMALL = (
    "world.videos=6",
    "world.shots_per_video=4",
    "evaluation_prompts=8",
    "stream_frames=32",
    "autoencoder.steps=30",
    "autoencoder.seconds=20",
    "train.steps=240",
    "train.global_batch=8",
    "train.checkpoint.every=20",
    "train.validation.every=240",
    "train.model.depth=2",
    "distill.steps=4",
    "distill.global_batch=8",
    "distill.teacher.micro_steps=2",
)


def start_demo(out, *overrides):
    return started(
        *(sys.executable, "-m", "jobs.demo", "--out", out, *SMALL, *overrides),
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
        # A shell's background jobs ignore Ctrl-C, and their children with them; this one shall not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(folder, pattern, process, seconds=400):
    deadline = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{folder}/{pattern} did not appear"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_interrupted_demo_continues_and_a_finished_one_does_nothing_twice(tmp_path, monkeypatch):
    out = tmp_path / "demo"
    with start_demo(out) as process:
        wait_for(out, "teacher/checkpoints/step-*/complete.json", process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    assert not (out / "teacher/model").exists(), "it was to be interrupted, not finished"
    manifest = (out / "dataset/manifest.json").read_bytes()

    with start_demo(out) as process:
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert (out / "dataset/manifest.json").read_bytes() == manifest
    metrics = [json.loads(line) for line in (out / "teacher/metrics.jsonl").open()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, *range(20, 241, 20)]

    assert load_manifest(out / "dataset").selection.rows > 8
    assert read_video(out / "stream.mp4").shape == (32, 256, 256, 3)
    assert (out / "contact-sheet.png").stat().st_size > 0
    page = (out / "summary.html").read_text()
    for word in ("Distil", "models:/streamdit-demo@demo", "mlflow ui", "Direction"):
        assert word in page
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{out}/mlflow/mlflow.db")
    model = streamdit.load("models:/streamdit-demo@demo")
    assert (model.scheme().c, model.scheme().s) == (1, 1)
    assert next(model.stream("a red circle moving left over a blue background")).frames.any()

    weights = (out / "student/model/model.safetensors").stat().st_mtime_ns
    with start_demo(out) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("is finished already") == 2
    assert "is version 1 already" in said
    assert (out / "student/model/model.safetensors").stat().st_mtime_ns == weights


def test_a_setting_of_no_stage_is_one_line(tmp_path):
    with start_demo(tmp_path / "demo", "training.steps=3") as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert said.startswith("error: training")
    assert len(said.strip().splitlines()) == 1


@pytest.mark.slow
def test_training_commands_tell_newcomers_what_does_not_fit(tmp_path):
    def run(module, *arguments):
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    for module, arguments, said in (
        ("jobs.train", [str(tmp_path)], "has no manifest.json"),
        ("jobs.train", [str(tmp_path), "partition.entries=[{chunk_frames: 3}]"], "chunk_frames 3"),
        ("jobs.train", [str(tmp_path / "none")], "does not exist"),
        ("jobs.distill", [str(tmp_path), "steps=many"], "steps=many"),
    ):
        result = run(module, *arguments)
        assert result.returncode == 2, result.stderr
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
