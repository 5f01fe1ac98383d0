"""Whole runs of the trainer under torchrun: resume, sharding, export."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_dataset import train_settings, write_dataset
from safetensors.torch import load_file

from streamdit.io import load_model
from training.checkpoint import find_checkpoints
from training.config import TrainConfig
from training.metrics import read_metrics

WORKER = """
import json, os, signal, sys
from pathlib import Path
from training.config import TrainConfig
from training.job import TrainJob
from training.loop import train_loop
from training.run import Run
from training.objective import make_flow_matching

settings, dataset, out, crash_at = json.loads(sys.argv[1])
config = TrainConfig.model_validate(settings)
if crash_at:
    train_step = Run._train_step
    def crashing_step(run, batches):
        if run.step == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(run, batches)
    Run._train_step = crashing_step
train_loop(
    TrainJob(
        config, config.model, config.partition, config.sampling, dataset, out, make_flow_matching
    )
)
"""


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


def run(dataset, out, workers=1, crash_at=0, **changes):
    """Run the trainer under torchrun; returns its exit status and what it said."""
    out = Path(out)
    settings = train_settings(tracking={"directory": str(out / "mlflow")}, **changes)
    worker = out.parent / "worker.py"
    worker.write_text(WORKER)
    arguments = json.dumps([settings, str(dataset), str(out), crash_at])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={workers}",
        *(str(worker), arguments),
    ]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def losses(out):
    rows = read_metrics(Path(out) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def assert_resumes_exactly(dataset, folder, stage, workers):
    straight, broken = folder / "straight", folder / "broken"
    options = {"workers": workers, "zero_stage": stage}
    status, said = run(dataset, straight, **options)
    assert status == 0, said
    status, _ = run(dataset, broken, crash_at=4, **options)
    assert status != 0
    assert [path.name for path in find_checkpoints(broken / "checkpoints")] == ["step-00000003"]
    assert not (broken / "model").exists()
    status, said = run(dataset, broken, **options)
    assert status == 0, said
    assert sorted(losses(straight)) == list(range(1, 7))
    assert losses(broken) == losses(straight)
    weights = [load_file(out / "model" / "model.safetensors") for out in (straight, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resumed_run_matches_uninterrupted_run(dataset_dir, tmp_path):
    assert_resumes_exactly(dataset_dir, tmp_path, stage=1, workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_run_matches_uninterrupted_run_at_higher_stages(dataset_dir, tmp_path, stage):
    assert_resumes_exactly(dataset_dir, tmp_path, stage=stage, workers=2)


@pytest.mark.slow
def test_losses_do_not_depend_on_stage_or_number_of_workers(dataset_dir, tmp_path):
    curves = {}
    for workers, stage in ((1, 1), (2, 1), (2, 2), (2, 3)):
        out = tmp_path / f"{workers}-{stage}"
        status, said = run(dataset_dir, out, workers=workers, zero_stage=stage)
        assert status == 0, said
        curves[workers, stage] = losses(out)
    for curve in curves.values():
        assert curve == pytest.approx(curves[1, 1], rel=1e-5)


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch(dataset_dir, tmp_path):
    curves = []
    for micro_batch in (8, 2):
        out = tmp_path / str(micro_batch)
        status, said = run(dataset_dir, out, micro_batch=micro_batch)
        assert status == 0, said
        curves.append(losses(out))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_exported_model_is_the_average_and_lineage_says_where_it_came_from(dataset_dir, tmp_path):
    """With decay 0 the last weights are exported; both differ and both load."""
    averaged, last = tmp_path / "averaged", tmp_path / "last"
    for out, decay in ((averaged, 0.9), (last, 0.0)):
        status, said = run(dataset_dir, out, ema_decay=decay)
        assert status == 0, said
    one, config = load_model(averaged / "model")
    two, _ = load_model(last / "model")
    distance = sum(
        (a - b).square().sum() for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )
    assert distance > 0
    assert config.lineage["step"] == 6
    assert config.lineage["dataset_fingerprint"] == "test"
    assert config.model == TrainConfig.model_validate(train_settings()).model
    # The optimizer's own checkpoint holds the last weights by name.
    checkpoint = find_checkpoints(last / "checkpoints")[0]
    state = torch.load(
        next(checkpoint.glob("deepspeed/*model_states.pt")), weights_only=False, map_location="cpu"
    )["module"]
    assert all(torch.equal(state[name], value) for name, value in two.state_dict().items())


def test_run_is_recorded_in_mlflow_and_a_changed_configuration_is_refused(dataset_dir, tmp_path):
    from mlflow import MlflowClient

    out = tmp_path / "run"
    status, said = run(dataset_dir, out)
    assert status == 0, said
    client = MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("streamdit")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.learning_rate"] == "0.002"
    assert found.data.params["model.width"] == "32"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {metric.step: metric.value for metric in history} == losses(out)
    assert found.data.metrics["validation_loss"] > 0
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id, "model")}
    assert {"model/config.json", "model/model.safetensors"} <= artifacts

    status, said = run(dataset_dir, out, seed=1)
    assert status != 0
    assert re.search(r"UserError: .*was made with another configuration or data set", said)
