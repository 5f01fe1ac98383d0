"""Held-out loss: fixed draws, on the averaged weights, without touching the run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_dataset import write_dataset
from mlflow import MlflowClient
from PIL import Image
from training_runs import losses, tiny_job, train

import streamdit
from streamdit.io import load_model
from training.data import LatentDataset
from training.loader import BatchLoader
from training.metrics import read_metrics
from training.objective import make_flow_matching, stack_draws
from training.order import BatchOrder, sample_generator
from training.samples import write_gif
from training.validation import VALIDATION_SEED, first_of_each_bucket


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


def rows(out):
    return [row for row in read_metrics(out / "metrics.jsonl") if "validation_loss" in row]


def held_out_loss(out, dataset_dir, model):
    """Mean loss over the four held-out clips, one by one."""
    job = tiny_job(dataset_dir, out)
    objective = make_flow_matching(job, torch.device("cpu"))
    held_out = LatentDataset(dataset_dir, "held_out")
    order = BatchOrder(held_out.buckets, 1, seed=0)
    loader = BatchLoader(held_out, order, 4, 0, 1, micro_batch=1)
    total = 0.0
    for index in range(4):
        batch = loader.collate(range(4), [index], VALIDATION_SEED)
        generator = sample_generator(VALIDATION_SEED, 0, index, "draws")
        draws = stack_draws([objective.draw(batch.latents.shape[1:], generator)])
        with torch.no_grad():
            total += float(objective(model, batch, draws)[0])
    return total / 4


@pytest.mark.parametrize("stage", [1, 3])
def test_held_out_loss_is_that_of_the_exported_average(dataset_dir, tmp_path, stage):
    out = tmp_path / "out"
    train(dataset_dir, out, zero_stage=stage)
    (row,) = rows(out)
    model, _ = load_model(out / "model")
    expected = held_out_loss(out, dataset_dir, model)
    assert row["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["validation_loss_raw"] != row["validation_loss"]
    assert {"validation_loss_chunk_1", "validation_loss_segment_4"} & set(row)


def test_without_an_average_it_is_that_of_the_last_weights(dataset_dir, tmp_path):
    train(dataset_dir, tmp_path / "out", ema_decay=0.0)
    (row,) = rows(tmp_path / "out")
    assert "validation_loss_raw" not in row
    model, _ = load_model(tmp_path / "out" / "model")
    expected = held_out_loss(tmp_path / "out", dataset_dir, model)
    assert row["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("stage", "precision"), [(1, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_validating_changes_nothing_of_the_run(dataset_dir, tmp_path, stage, precision):
    options = {"zero_stage": stage, "precision": precision}
    train(dataset_dir, tmp_path / "often", validation={"every": 1, "samples": 2}, **options)
    train(dataset_dir, tmp_path / "never", validation={"samples": 0}, **options)
    assert len(rows(tmp_path / "often")) == 6
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


@pytest.mark.parametrize("stage", [1, 3])
def test_videos_of_held_out_captions_are_those_of_the_exported_average(
    dataset_dir, tmp_path, stage
):
    out = tmp_path / "out"
    train(dataset_dir, out, zero_stage=stage, validation={"every": 6, "samples": 0, "videos": 3})
    files = sorted((out / "samples" / "step-00000006").iterdir())
    assert [file.name for file in files] == [f"{n:02d}-clip-{20 + n:03d}.gif" for n in range(3)]
    client = MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    run_id = json.loads((out / "mlflow-run.json").read_text())["run_id"]
    logged = {item.path for item in client.list_artifacts(run_id, "samples/step-00000006")}
    assert logged == {f"samples/step-00000006/{file.name}" for file in files}

    # Clip 20 is of the third kind of caption.
    stream = streamdit.load(out / "model").stream("nothing", seed=0)
    expected = []
    while len(expected) < 16:
        expected += list(next(stream).frames)
    write_gif(tmp_path / "expected.gif", np.stack(expected), fps=16)
    with Image.open(files[0]) as video, Image.open(tmp_path / "expected.gif") as same:
        assert video.n_frames == 16
        assert video.info["duration"] == 60
        for number, picture in enumerate(expected):
            video.seek(number)
            same.seek(number)
            shown, wanted = (np.asarray(v.convert("RGB")).astype(float) for v in (video, same))
            # Captions of a data set are kept in bfloat16; another video differs by about 60.
            assert np.abs(shown - wanted).mean() < 6
            assert np.abs(shown - picture).mean() < 20  # a GIF has 256 colours


def test_clips_are_taken_from_the_buckets_in_turn():
    dataset = SimpleNamespace(buckets={"b": [5, 6], "a": [1, 2, 3, 4], "c": [7]})
    assert first_of_each_bucket(dataset, 6) == [1, 5, 7, 2, 6, 3]
    assert first_of_each_bucket(dataset, 99) == [1, 5, 7, 2, 6, 3, 4]
