"""Continuing a run: on other workers, past damage, with what is kept on disk."""

import json
import shutil

import pytest
import torch
from latent_dataset import write_dataset
from safetensors.torch import load_file
from training_runs import losses, train, train_together

from training.checkpoint import find_checkpoints, read_facts
from training.metrics import read_metrics
from training.shards import SavedShards

STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def runs(dataset_dir, tmp_path_factory):
    """One worker: a whole run, and broken ones that two workers finish. Two: broken ones."""
    folder = tmp_path_factory.mktemp("runs")
    train(dataset_dir, folder / "whole")
    together = []
    for stage in STAGES:
        begun = {"dataset": dataset_dir, "out": folder / f"one-then-two-{stage}"}
        train(**begun, crash_at=4, zero_stage=stage)
        together += [
            begun | {"zero_stage": stage},
            begun | {"out": folder / f"two-{stage}", "crash_at": 4, "zero_stage": stage},
        ]
    train_together(folder, together)
    return folder


def exported(out):
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(out, whole):
    """Same losses and same averaged weights, up to the rounding of another summation order."""
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6]
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    found, expected = exported(out), exported(whole)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_continue_what_one_began(runs, stage):
    assert_same_run(runs / f"one-then-two-{stage}", runs / "whole")


@pytest.mark.parametrize("stage", STAGES)
def test_one_worker_continues_what_two_began(runs, dataset_dir, tmp_path, stage):
    out = shutil.copytree(runs / f"two-{stage}", tmp_path / "out")
    assert read_facts(find_checkpoints(out / "checkpoints")[0]).world_size == 2
    train(dataset_dir, out, zero_stage=stage)
    assert_same_run(out, runs / "whole")


def test_names_and_shapes_of_saved_shards_are_the_models(runs):
    expected = exported(runs / "whole")
    for stage in STAGES:
        folder = find_checkpoints(runs / f"two-{stage}" / "checkpoints")[0]
        shards = SavedShards(folder, world_size=2)
        assert shards.shapes == {name: tuple(value.shape) for name, value in expected.items()}
        assert (shards.updates, shards.adam_steps) == (3, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_run_continues_to_the_last_bit(runs, dataset_dir, tmp_path, stage):
    train(dataset_dir, tmp_path / "straight", zero_stage=stage)
    train(dataset_dir, tmp_path / "broken", zero_stage=stage, crash_at=5)
    assert not (tmp_path / "broken" / "model").exists()
    train(dataset_dir, tmp_path / "broken", zero_stage=stage)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    found, expected = exported(tmp_path / "broken"), exported(tmp_path / "straight")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_broken_run_in_bfloat16_with_accumulation_continues_to_the_last_bit(
    dataset_dir, tmp_path
):
    options = {"precision": "bfloat16", "micro_batch": 2}
    train(dataset_dir, tmp_path / "straight", **options)
    train(dataset_dir, tmp_path / "broken", crash_at=5, **options)
    train(dataset_dir, tmp_path / "broken", **options)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    found, expected = exported(tmp_path / "broken"), exported(tmp_path / "straight")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def cut_short(folder):
    (path,) = folder.glob("deepspeed/*optim_states.pt")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def change_a_byte(folder):
    path = folder / "ema-rank00000.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_a_file(folder):
    (folder / "ema-rank00000.pt").unlink()


def garble_the_marker(folder):
    (folder / "complete.json").write_text('{"step":')


def forget_the_marker(folder):
    (folder / "complete.json").unlink()


@pytest.fixture(scope="module")
def broken(runs, dataset_dir, tmp_path_factory):
    """A run that saved steps 2 and 4 and died at 5."""
    out = tmp_path_factory.mktemp("broken") / "out"
    train(dataset_dir, out, crash_at=5, checkpoint={"every": 2, "keep": 3})
    return out


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_short, "optim_states.pt has"),
        (change_a_byte, "the content of ema-rank00000.pt has changed"),
        (remove_a_file, "ema-rank00000.pt is missing"),
        (garble_the_marker, "complete.json cannot be read"),
        (forget_the_marker, "it has no complete.json: it was not written to its end"),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    runs, broken, dataset_dir, tmp_path, caplog, damage, told
):
    out = shutil.copytree(broken, tmp_path / "out")
    newest, before = find_checkpoints(out / "checkpoints")
    assert (newest.name, before.name) == ("step-00000004", "step-00000002")
    damage(newest)
    train(dataset_dir, out, checkpoint={"every": 2, "keep": 3})
    assert told in caplog.text
    assert "step-00000004 is damaged" in caplog.text
    assert "trying the one before" in caplog.text
    assert losses(out) == losses(runs / "whole")
    # The damaged one was made again.
    names = [path.name for path in find_checkpoints(out / "checkpoints")]
    assert names == ["step-00000006", "step-00000004", "step-00000002"]


def test_without_any_usable_checkpoint_the_run_says_so_and_starts_over(
    runs, broken, dataset_dir, tmp_path, caplog
):
    out = shutil.copytree(broken, tmp_path / "out")
    for folder in find_checkpoints(out / "checkpoints"):
        remove_a_file(folder)
    train(dataset_dir, out, checkpoint={"every": 2, "keep": 3})
    assert "starting from step 0" in caplog.text
    assert losses(out) == losses(runs / "whole")
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_newest_checkpoints_and_every_mth_stay(runs, dataset_dir, tmp_path):
    half_written = tmp_path / "out" / "checkpoints" / "step-00000001"
    half_written.mkdir(parents=True)
    (half_written / "ema-rank00000.pt").write_bytes(b"cut")
    train(dataset_dir, tmp_path / "out", checkpoint={"every": 1, "keep": 2, "keep_every": 3})
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000005", "step-00000006"]


def test_a_damaged_newer_checkpoint_pushes_out_nothing_that_is_made_after_it(dataset_dir, tmp_path):
    out, options = tmp_path / "out", {"validation": {"samples": 0}}
    train(dataset_dir, out, crash_at=4, checkpoint={"every": 2, "keep": 2}, **options)
    for folder in find_checkpoints(out / "checkpoints"):
        remove_a_file(folder)
    train(
        dataset_dir, out, crash_at=1, checkpoint={"every": 1, "keep": 1, "keep_every": 2}, **options
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_lists_its_files_with_size_and_hash(broken):
    folder = find_checkpoints(broken / "checkpoints")[0]
    marker = json.loads((folder / "complete.json").read_text())
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(marker["files"]) == files - {"complete.json"}
    assert (marker["step"], marker["samples"]) == (4, 32)


def test_stage_micro_batch_and_memory_savers_may_change_on_the_way(
    runs, broken, dataset_dir, tmp_path
):
    out = shutil.copytree(broken, tmp_path / "out")
    train(dataset_dir, out, micro_batch=2, zero_stage=2, activation_checkpointing=True)
    assert_same_run(out, runs / "whole")


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_on_the_host_trains_alike_and_resumes(runs, dataset_dir, tmp_path, stage):
    options = {"offload_optimizer": True, "zero_stage": stage}
    train(dataset_dir, tmp_path / "out", crash_at=4, **options)
    train(dataset_dir, tmp_path / "out", **options)
    assert_same_run(tmp_path / "out", runs / "whole")
