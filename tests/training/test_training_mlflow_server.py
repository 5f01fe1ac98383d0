"""A team's MLflow server: PostgreSQL behind it, artifacts in S3, two people at once."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import mlflow
import pytest
from latent_dataset import write_dataset
from mlflow_server import mlflow_server, s3_client
from processes import started

import streamdit
from streamdit.io import read_model_config

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "model.latent_channels=4",
    "model.buckets=[{frames: 4, height: 4, width: 4, window: [2, 2, 2]}]",
    *("model.width=32", "model.depth=2", "model.heads=2", "model.ffn_width=64"),
    *("model.text={bytes: 16}", "model.time_frequencies=32"),
    "partition.entries=[{chunk_frames: 1}, {chunk_frames: 4}]",
    *("sampling.chunk_frames=1", "sampling.micro_steps=1", "steps=3", "global_batch=4"),
    *("precision=float32", "log_every=1", "launch.workers=1", "validation.samples=2"),
)


def start(address, module, *words):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    return started(
        *(sys.executable, "-m", f"jobs.{module}", *words),
        cwd=ROOT,
        # Neither the store's address nor its keys: the server hands artifacts on.
        env={**environment, "MLFLOW_TRACKING_URI": address, "OMP_NUM_THREADS": "1"},
    )


def finish(*commands):
    with ExitStack() as stack:
        for process in [stack.enter_context(command) for command in commands]:
            said, _ = process.communicate(timeout=500)
            assert process.returncode == 0, said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_at_once_train_on_ray_register_and_load_through_one_server(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data")
    with mlflow_server(tmp_path) as (address, store):
        finish(
            *(
                start(
                    *(address, "train", data, "--out", tmp_path / f"run-{seed}"),
                    *("--preset", "demo", *SETTINGS, f"seed={seed}"),
                )
                for seed in (1, 2)
            )
        )
        finish(
            *(
                start(
                    *(address, "register", tmp_path / f"run-{seed}" / "model"),
                    *("--name", "shared", "--alias", f"seed-{seed}"),
                )
                for seed in (1, 2)
            )
        )
        for key in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(key)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        mlflow.set_tracking_uri(address)
        client = mlflow.MlflowClient()
        versions = client.search_model_versions("name = 'shared'")
        assert {version.version for version in versions} == {"1", "2"}

        for seed in (1, 2):
            own = read_model_config(tmp_path / f"run-{seed}" / "model")
            version = client.get_model_version_by_alias("shared", f"seed-{seed}")
            assert version.tags["weights_sha256"] == own.weights_sha256
            run = client.get_run(own.lineage["run_id"])
            assert run.info.status == "FINISHED"
            assert run.data.params["seed"] == str(seed)
            losses = client.get_metric_history(own.lineage["run_id"], "loss")
            assert [metric.step for metric in losses] == [1, 2, 3]
            loaded = streamdit.load(f"models:/shared@seed-{seed}")
            assert loaded.config.weights_sha256 == own.weights_sha256

        kept = s3_client(store).list_objects_v2(Bucket="mlflow")["Contents"]
        weights = [entry["Key"] for entry in kept if entry["Key"].endswith("model.safetensors")]
        assert len(weights) >= 2
        assert (tmp_path / "mlruns").exists() is False
