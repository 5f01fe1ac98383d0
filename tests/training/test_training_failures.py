"""What a run does when a step goes wrong, and when it is asked to stop."""

import json
import os
import signal
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from latent_dataset import write_dataset
from training_runs import losses, tiny_job, train

from streamdit.errors import UserError
from training.checkpoint import find_checkpoints
from training.export import export_checkpoint
from training.failures import is_out_of_memory
from training.loop import train_loop
from training.metrics import read_metrics
from training.objective import FlowMatching
from training.run import Run
from training.samples import sample_videos
from training.stop import Interrupted, in_main_thread
from training.validation import validate


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


def spoil(monkeypatch, steps, value):
    """Make the loss of optimizer steps `steps` (from 1) `value`."""
    call, count = FlowMatching.__call__, iter(range(1, 1000))

    def spoilt(self, student, batch, draws):
        loss, metrics = call(self, student, batch, draws)
        return (loss * value if next(count) in steps else loss), metrics

    monkeypatch.setattr(FlowMatching, "__call__", spoilt)


@pytest.mark.parametrize(
    ("stage", "precision", "value"),
    [
        (1, "float32", float("nan")),
        (2, "bfloat16", float("inf")),
        (3, "bfloat16", float("nan")),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    dataset_dir, tmp_path, monkeypatch, stage, precision, value
):
    spoil(monkeypatch, {3}, value)
    options = {"validation": {"samples": 0}, "precision": precision, "zero_stage": stage}
    train(dataset_dir, tmp_path / "out", **options)
    rows = list(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["step"] for row in rows if not -1e9 < row["loss"] < 1e9] == [3]
    (saved,) = (tmp_path / "out" / "skipped").iterdir()
    content = json.loads(saved.read_text())
    assert content["step"] == 3
    assert len(content["micro_batches"][0]["clip_ids"]) == 8
    assert all(clip.startswith("clip-") for clip in content["micro_batches"][0]["clip_ids"])
    weights = torch.load(
        next((tmp_path / "out").glob("checkpoints/step-00000006/ema-*.pt")), weights_only=True
    )
    assert weights["updates"] == 5
    assert all(torch.isfinite(shard).all() for shard in weights["shards"])


def test_many_such_steps_in_a_row_stop_the_run_with_the_clips_named(
    dataset_dir, tmp_path, monkeypatch
):
    spoil(monkeypatch, {2, 4, 5, 6}, float("nan"))
    with pytest.raises(UserError, match="3 steps in a row, up to step 6; the clips are listed in"):
        train(dataset_dir, tmp_path / "out", skip_limit=3, validation={"samples": 0})
    assert len(list((tmp_path / "out" / "skipped").iterdir())) == 4
    newest = find_checkpoints(tmp_path / "out" / "checkpoints")[0]
    assert newest.name == "step-00000003"


def test_a_larger_limit_goes_on_past_such_steps_as_the_message_says(
    dataset_dir, tmp_path, monkeypatch
):
    off, out = {"samples": 0}, tmp_path / "out"
    with monkeypatch.context() as spoilt:
        spoil(spoilt, {4, 5}, float("nan"))
        with pytest.raises(UserError, match="the same command with a larger skip_limit"):
            train(dataset_dir, out, skip_limit=2, validation=off)
    spoil(monkeypatch, {1, 2}, float("nan"))  # steps 4 and 5, made again
    train(dataset_dir, out, skip_limit=3, validation=off)
    assert [row["skipped_steps"] for row in read_metrics(out / "metrics.jsonl")] == [
        0,
        0,
        0,
        1,
        2,
        2,
    ]


def test_running_out_of_memory_is_one_line_with_sizes_and_remedies(
    dataset_dir, tmp_path, monkeypatch
):
    def allocate(self, student, batch, draws):
        return torch.empty(1 << 50), {}

    monkeypatch.setattr(FlowMatching, "__call__", allocate)
    with pytest.raises(UserError) as caught:
        train(dataset_dir, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert "out of memory on rank 0 (cpu)" in message
    assert "micro-batch of 8 latents 4x4x4x4" in message
    assert "try micro_batch=4 or activation_checkpointing=true or zero_stage=2" in message


def test_running_out_of_memory_before_the_first_step_is_one_line_too(
    dataset_dir, tmp_path, monkeypatch
):
    def allocate(*arguments):
        return torch.empty(1 << 50)

    monkeypatch.setattr("training.loop.build_engine", allocate)
    with pytest.raises(UserError) as caught:
        train(dataset_dir, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert "out of memory before the first step on rank 0 (cpu)" in message
    assert message.endswith("try zero_stage=2 or offload_optimizer=true")


def test_running_out_of_memory_in_validation_names_what_validation_needs(
    dataset_dir, tmp_path, monkeypatch
):
    def decode(*arguments):
        raise MemoryError("Unable to allocate 4.00 TiB for an array")

    monkeypatch.setattr("training.run.sample_videos", decode)
    validation = {"every": 1, "samples": 2, "videos": 1}
    with pytest.raises(UserError, match=r"^out of memory in validation on rank 0 .*") as caught:
        train(dataset_dir, tmp_path / "out", validation=validation, zero_stage=3)
    assert str(caught.value).endswith(
        "try validation.videos=0 or validation.samples=0 or offload_optimizer=true"
    )


def test_skipped_steps_are_still_counted_after_a_resume(dataset_dir, tmp_path, monkeypatch):
    out, options = tmp_path / "out", {"skip_limit": 3, "validation": {"samples": 0}}
    with monkeypatch.context() as first:
        spoil(first, {1, 3}, float("nan"))
        train(dataset_dir, out, crash_at=3, **options)
    with monkeypatch.context() as second:
        spoil(second, {1, 2}, float("nan"))
        with pytest.raises(UserError, match="3 steps in a row, up to step 5"):
            train(dataset_dir, out, **options)
    rows = list(read_metrics(out / "metrics.jsonl"))
    assert [row["skipped_steps"] for row in rows] == [1, 1, 2, 3]


def test_a_validation_that_fails_costs_no_step_and_is_made_up_for(
    dataset_dir, tmp_path, monkeypatch
):
    train(dataset_dir, tmp_path / "straight")
    with monkeypatch.context() as context:
        context.setattr("training.run.validate", Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            train(dataset_dir, tmp_path / "out")
    assert find_checkpoints(tmp_path / "out" / "checkpoints")[0].name == "step-00000006"

    def figures(out):
        rows = read_metrics(tmp_path / out / "metrics.jsonl")
        return [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]

    train(dataset_dir, tmp_path / "out")
    assert len(figures("straight")) == 1
    assert figures("out") == figures("straight")


def stop_at(monkeypatch, step):
    train_step = Run._train_step

    def stopping(run, batches, stop):
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, batches, stop)

    monkeypatch.setattr(Run, "_train_step", stopping)


def test_sigterm_saves_a_checkpoint_from_which_the_run_goes_on(
    dataset_dir, tmp_path, monkeypatch, caplog
):
    train(dataset_dir, tmp_path / "straight")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as context:
        stop_at(context, 4)
        with pytest.raises(Interrupted, match="stopped at step 5; the same command continues"):
            train(dataset_dir, tmp_path / "out")
    assert "rank 0 was asked to stop" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    assert find_checkpoints(tmp_path / "out" / "checkpoints")[0].name == "step-00000005"
    train(dataset_dir, tmp_path / "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")


def test_sigterm_is_heard_by_a_loop_in_another_thread(dataset_dir, tmp_path, monkeypatch):
    """A Ray Train worker runs the loop so."""
    stop_at(monkeypatch, 4)
    ended = []

    def loop():
        try:
            train_loop(tiny_job(dataset_dir, tmp_path / "out"))
        except Interrupted as stopped:
            ended.append(str(stopped))

    thread = threading.Thread(target=loop)
    thread.start()
    while thread.is_alive():  # the main thread executes Python now and then
        time.sleep(0.01)
    assert ended == ["stopped at step 5; the same command continues"]
    assert find_checkpoints(tmp_path / "out" / "checkpoints")[0].name == "step-00000005"


def test_a_call_is_run_in_the_main_thread_or_reported_late(monkeypatch):
    where, answers = [], []
    thread = threading.Thread(
        target=lambda: answers.append(
            in_main_thread(lambda: where.append(threading.current_thread()))
        )
    )
    thread.start()
    while thread.is_alive():
        time.sleep(0.01)
    assert answers == [True]
    assert where == [threading.main_thread()]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_allocators_that_raise_plain_errors_are_understood(text, known):
    assert is_out_of_memory(RuntimeError(text)) is known


@pytest.mark.parametrize("what", ["reading", "saving"])
def test_memory_that_runs_out_between_steps_is_one_line_too(
    dataset_dir, tmp_path, monkeypatch, what
):
    def allocate(*_, **__):
        return torch.empty(1 << 50)

    if what == "reading":
        monkeypatch.setattr("training.loader.BatchLoader.collate", allocate)
    else:
        monkeypatch.setattr("training.run.save_checkpoint", allocate)
    remedy = {"reading": "a smaller data.cache_mb", "saving": "zero_stage=2"}[what]
    told = rf"^out of memory {what} on rank 0 \(cpu\): .* try {remedy}"
    with pytest.raises(UserError, match=told):
        train(dataset_dir, tmp_path / "out", validation={"samples": 0})


@pytest.mark.parametrize(("during", "samples"), [("validation", 2), ("videos", 2), ("videos", 0)])
@pytest.mark.parametrize("at", [2, 6])
def test_a_request_to_stop_does_not_wait_for_a_validation(
    dataset_dir, tmp_path, monkeypatch, during, samples, at
):
    """What was not validated is so by whoever continues, and the figures are the same."""
    validation = {"every": at, "samples": samples, "videos": 2}
    train(dataset_dir, tmp_path / "straight", validation=validation)
    name = {"validation": "training.run.validate", "videos": "training.run.sample_videos"}[during]
    whole = {"validation": validate, "videos": sample_videos}[during]

    def asked_to_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as asked:
        asked.setattr(name, asked_to_stop)
        with pytest.raises(Interrupted, match=f"stopped at step {at}; the same command continues"):
            train(dataset_dir, out, validation=validation)
    assert find_checkpoints(out / "checkpoints")[0].name == f"step-{at:08d}"
    assert not any("validation_videos" in row for row in read_metrics(out / "metrics.jsonl"))
    train(dataset_dir, out, validation=validation)

    def validated(folder):
        return [row for row in read_metrics(folder / "metrics.jsonl") if "validation_videos" in row]

    assert validated(out) == validated(tmp_path / "straight")
    assert [row["step"] for row in validated(out)] == list(range(at, 7, at))
    assert losses(out) == losses(tmp_path / "straight")
    videos = [len(list(f.glob(f"samples/step-{at:08d}/*"))) for f in (out, tmp_path / "straight")]
    assert videos == [2, 2]


def test_a_request_to_stop_while_the_model_is_written_lets_it_be_finished(
    dataset_dir, tmp_path, monkeypatch
):
    def asked_to_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return export_checkpoint(*arguments)

    monkeypatch.setattr("training.loop.export_checkpoint", asked_to_stop)
    train(dataset_dir, tmp_path / "out", validation={"samples": 0})
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
