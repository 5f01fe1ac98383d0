"""Whole runs of the trainer: killed workers, sharding, accumulation, export, MLflow."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from latent_dataset import train_settings, write_dataset
from processes import run
from safetensors.torch import load_file
from training_runs import losses, tiny_job, train, train_together

from jobs.config import load_config
from streamdit.errors import UserError
from streamdit.io import load_model
from streamdit.model import build_dit
from training.checkpoint import find_checkpoints, read_facts
from training.config import TrainConfig
from training.engine import fused_by_default
from training.metrics import read_metrics
from training.objective import FlowMatching
from training.revision import git_revision


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def straight(dataset_dir, tmp_path_factory):
    """Uninterrupted runs of two workers, at every stage."""
    folder = tmp_path_factory.mktemp("straight")
    runs = [{"dataset": dataset_dir, "out": folder / str(s), "zero_stage": s} for s in (1, 2, 3)]
    train_together(folder, runs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("killed", [(1,), (0, 1)], ids=["one killed", "all killed"])
def test_run_resumed_after_a_kill_matches_uninterrupted_run(
    straight, dataset_dir, tmp_path, stage, killed
):
    run = {"dataset": dataset_dir, "out": tmp_path / "out", "zero_stage": stage}
    train_together(tmp_path, [run | {"crash_at": 4, "killed": killed}], dies=True)
    (saved,) = find_checkpoints(tmp_path / "out" / "checkpoints")
    assert saved.name == "step-00000003"
    assert not (tmp_path / "out" / "model").exists()
    train_together(tmp_path, [run])
    expected = straight / str(stage)
    assert sorted(losses(expected)) == list(range(1, 7))
    assert losses(tmp_path / "out") == losses(expected)
    weights = [
        load_file(out / "model" / "model.safetensors") for out in (expected, tmp_path / "out")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_losses_do_not_depend_on_stage_or_number_of_workers(straight, dataset_dir, tmp_path):
    train(dataset_dir, tmp_path / "alone")
    for stage in (1, 2, 3):
        assert losses(straight / str(stage)) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_accumulated_micro_batches_equal_one_batch(dataset_dir, tmp_path):
    for micro_batch in (8, 2):
        train(dataset_dir, tmp_path / str(micro_batch), micro_batch=micro_batch)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "8"), rel=1e-5)


@pytest.mark.parametrize(
    ("micro_batch", "workers", "expected"),
    [(None, 4, (16, 1)), (8, 4, (8, 2)), (8, 16, (4, 1)), (6, 4, (4, 4)), (1, 2, (1, 32))],
)
def test_micro_batch_is_the_largest_that_divides_a_workers_share(micro_batch, workers, expected):
    config = load_config(TrainConfig, stage="train", preset="small")
    config = config.model_copy(update={"global_batch": 64, "micro_batch": micro_batch})
    assert config.accumulation(workers) == expected
    with pytest.raises(UserError, match="global_batch 64 is not divisible by 3 workers"):
        config.accumulation(3)


def test_figures_are_computed_for_logged_steps_only(dataset_dir, tmp_path, monkeypatch):
    figures, computed = FlowMatching._figures, []

    def counted(*arguments):
        computed.append(arguments)
        return figures(*arguments)

    monkeypatch.setattr(FlowMatching, "_figures", counted)
    options = {"log_every": 4, "micro_batch": 4, "validation": {"samples": 0}}
    train(dataset_dir, tmp_path / "out", **options)
    rows = [row for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 4, 6]
    assert all("loss_chunk_1" in row or "loss_chunk_4" in row for row in rows)
    assert len(computed) == 3 * 2  # micro-batches


def test_exported_model_is_the_average_and_lineage_says_where_it_came_from(dataset_dir, tmp_path):
    """With decay 0 the last weights are exported; both differ and both load."""
    averaged, last = tmp_path / "averaged", tmp_path / "last"
    for out, decay in ((averaged, 0.9), (last, 0.0)):
        train(dataset_dir, out, ema_decay=decay)
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
    train(dataset_dir, out)
    client = MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("streamdit")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.source.git.commit"] == git_revision()
    assert found.data.tags["dataset_fingerprint"] == "test"
    assert found.data.params["optimizer.learning_rate"] == "0.002"
    assert found.data.params["model.width"] == "32"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {metric.step: metric.value for metric in history} == losses(out)
    assert found.data.metrics["validation_loss"] > 0
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id, "model")}
    assert {"model/config.json", "model/model.safetensors"} <= artifacts

    with pytest.raises(UserError, match=r"step-\d+ was made with seed=0, not 1: what decides"):
        train(dataset_dir, out, seed=1)


@pytest.mark.slow
def test_sigterm_to_one_worker_saves_and_that_worker_exits_0(dataset_dir, tmp_path):
    """Through the real command, started by hand as torchrun would start it."""
    settings = tmp_path / "train.json"
    settings.write_text(json.dumps(train_settings(steps=2000, checkpoint={"every": 1000})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "jobs.train", str(dataset_dir), "--out", str(out)),
        *("--config", str(settings), f"tracking.directory={tmp_path / 'mlflow'}"),
    ]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    root = str(Path(__file__).parents[2])
    workers = [
        subprocess.Popen(
            command,
            env=os.environ
            | shared
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 300
        while not losses(out):
            assert time.monotonic() < deadline
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.2)
        workers[1].send_signal(signal.SIGTERM)
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "rank 1 was asked to stop" in said[1]
    (saved,) = find_checkpoints(out / "checkpoints")
    step = read_facts(saved).step
    assert f"stopped at step {step}; the same command continues" in said[0]
    assert 0 < step < 2000


def test_machines_are_watched_while_the_run_lasts(dataset_dir, tmp_path):
    from mlflow import MlflowClient

    store = {"directory": str(tmp_path / "mlflow"), "system_every_s": 0.05}
    train(dataset_dir, tmp_path / "out", tracking=store)
    run_id = json.loads((tmp_path / "out" / "mlflow-run.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    metrics = client.get_run(run_id).data.metrics
    name = f"system/{socket.gethostname()}/system_memory_usage_percentage"
    assert 0 < metrics[name] <= 100
    steps = [metric.step for metric in client.get_metric_history(run_id, name)]
    assert steps == sorted(steps)
    assert set(steps) <= set(range(7))
    assert not list((tmp_path / "out").glob("mlflow-outbox*"))


def test_figures_of_a_run_are_in_mlflow(dataset_dir, tmp_path):
    from mlflow import MlflowClient

    out = tmp_path / "out"
    train(dataset_dir, out)
    run_id = json.loads((out / "mlflow-run.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    metrics = client.get_run(run_id).data.metrics
    wanted = {"loss", "gradient_norm", "learning_rate", "samples_per_s", "data_wait_share"}
    assert wanted | {"model_tflops_per_device", "peak_memory_gib", "eta_s"} <= set(metrics)
    for part in ("loss_chunk_", "loss_segment_", "validation_loss_segment_"):
        assert [name for name in metrics if name.startswith(part)]
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    for name in ("loss", "gradient_norm"):
        history = {m.step: m.value for m in client.get_metric_history(run_id, name)}
        assert history == pytest.approx({row["step"]: row[name] for row in rows})
        assert all(value > 0 for value in history.values())


def test_learning_rate_and_clipping_reach_the_optimizer(dataset_dir, tmp_path):
    """By what they do to the weights: Adam's first step is as long as its rate, if the gradient
    is large beside epsilon."""
    start = build_dit(tiny_job(dataset_dir, tmp_path / "x").model, 0).state_dict()

    def change(name, **optimizer):
        out = tmp_path / name
        settings = {"learning_rate": 1e-3, "weight_decay": 0.0, **optimizer}
        train(dataset_dir, out, steps=1, ema_decay=0.0, optimizer=settings)
        (row,) = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        weights = load_file(out / "model" / "model.safetensors")
        moved = torch.cat([(weights[key] - start[key]).flatten() for key in weights])
        return moved.abs().max().item(), row["learning_rate"]

    largest, logged = change("plain")
    assert logged == 1e-3
    assert largest == pytest.approx(1e-3, rel=0.05)
    largest, logged = change("warm", warmup_steps=4)
    assert logged == pytest.approx(2.5e-4)
    assert largest == pytest.approx(2.5e-4, rel=0.05)
    # Epsilon is 1e-8: gradients clipped to that norm move nothing as far as the rate.
    largest, _ = change("clipped", gradient_clip=1e-9)
    assert largest < 2e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recomputed", [False, 1])
def test_compiled_blocks_train_as_eager_ones_do(dataset_dir, tmp_path, recomputed):
    """Texts of any length too, in validation without gradients, and resumed in eager mode."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    options = {"activation_checkpointing": recomputed, "validation": {"every": 3, "samples": 4}}
    train(dataset_dir, tmp_path / "eager", **options)
    compiled = tmp_path / "compiled"
    assert not counters["stats"]["unique_graphs"]
    train(dataset_dir, compiled, crash_at=4, compile_blocks=True, **options)
    assert counters["stats"]["unique_graphs"] >= 2
    assert losses(compiled) == pytest.approx(
        {step: loss for step, loss in losses(tmp_path / "eager").items() if step <= 4}, rel=1e-4
    )
    train(dataset_dir, compiled, **options)
    assert losses(compiled) == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"zero_stage": 3}, "set zero_stage: 2"), ({"lora": {"rank": 2}}, "adapters")],
)
def test_blocks_are_not_compiled_where_weights_come_and_go(settings, told):
    with pytest.raises(ValueError, match=told):
        TrainConfig.model_validate(train_settings(compile_blocks=True, **settings))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_kernel_of_adam_resumes_exactly_and_at_another_stage(
    dataset_dir, tmp_path, stage, monkeypatch
):
    steps, kernel = [], torch._fused_adamw_

    def counted(*arguments, **options):
        steps.append(1)
        return kernel(*arguments, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    fused = {"optimizer": {"learning_rate": 1e-3, "fused": True}, "validation": {"samples": 0}}
    train(dataset_dir, tmp_path / "straight", zero_stage=stage, **fused)
    assert len(steps) == 6
    out = tmp_path / "out"
    train(dataset_dir, out, crash_at=4, zero_stage=stage, **fused)
    assert len(losses(out)) < 6
    train(dataset_dir, out, zero_stage=stage, **fused)
    assert losses(out) == losses(tmp_path / "straight")
    other = tmp_path / "other"
    train(dataset_dir, other, crash_at=4, zero_stage=stage, **fused)
    train(dataset_dir, other, zero_stage=1 + stage % 3, **fused)
    assert losses(other) == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    fused_steps = len(steps)
    assert fused_steps >= 3 * 6
    plain = {"optimizer": {"learning_rate": 1e-3}, "validation": {"samples": 0}}
    train(dataset_dir, tmp_path / "plain", zero_stage=stage, **plain)
    assert len(steps) == fused_steps
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)


def test_adam_is_one_kernel_on_a_gpu_unless_the_host_steps(dataset_dir, tmp_path):
    def chosen(device, **changes):
        return fused_by_default(tiny_job(dataset_dir, tmp_path, **changes).config, device)

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert (chosen(cuda), chosen(cpu)) == (True, False)
    assert not chosen(cuda, offload_optimizer=True)
    asked = {"learning_rate": 1e-3, "fused": True}
    assert chosen(cpu, optimizer=asked)
    assert not chosen(cuda, optimizer=asked | {"fused": False})


def test_settings_that_are_new_do_not_make_other_runs_of_those_begun_before(dataset_dir, tmp_path):
    identity = tiny_job(dataset_dir, tmp_path).identity()
    assert not {"loss_weighting", "compile_blocks"} & set(identity)
    assert "fused" not in identity["optimizer"]


TWO_WORKERS = """
import os, signal, sys
import torch.distributed as dist
import training.run
from training.validation import validate
from training_runs import train
dist.init_process_group("gloo")

def asked_to_stop(*arguments):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return validate(*arguments)

training.run.validate = asked_to_stop
try:
    train(sys.argv[1], sys.argv[2], validation={"every": 2, "samples": 4}, zero_stage=3)
finally:
    dist.destroy_process_group()
"""


def test_one_worker_that_is_asked_to_stop_in_a_validation_stops_all(dataset_dir, tmp_path):
    script, root = tmp_path / "workers.py", Path(__file__).parents[2]
    script.write_text(TWO_WORKERS)
    _, said = run(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node=2", script, dataset_dir, tmp_path / "out"),
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        timeout=240,
    )
    assert "stopped at step 2; the same command continues" in said
    assert find_checkpoints(tmp_path / "out" / "checkpoints")[0].name == "step-00000002"
    train_together(tmp_path, [{"dataset": dataset_dir, "out": tmp_path / "out", "zero_stage": 3}])
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4, 5, 6]


def test_training_begins_without_compiling_anything(dataset_dir, tmp_path, monkeypatch):
    built = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(built))
    run = {"dataset": dataset_dir, "out": tmp_path / "out", "steps": 1}
    train_together(tmp_path, [run], workers=1)
    assert not built.exists()
