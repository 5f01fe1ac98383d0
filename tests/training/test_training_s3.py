"""Data sets in an S3 store train like those in a folder."""

import pytest
import torch
from latent_dataset import write_dataset
from safetensors.torch import load_file
from training_runs import tiny_job, train

from jobs.training_job import check_dataset
from streamdit.autoencoder import load_autoencoder
from streamdit.errors import UserError
from training.data import LatentDataset
from training.export import read_record, write_record
from training.loader import BatchLoader
from training.order import BatchOrder


@pytest.fixture
def datasets(tmp_path, s3):
    """The same data set in a folder and in a bucket."""
    folder = write_dataset(tmp_path / "dataset")
    for path in folder.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "videos", f"sets/{path.relative_to(folder)}")
    return folder, "s3://videos/sets"


def test_batches_and_identity_from_s3_are_those_from_a_folder(datasets, tmp_path):
    batches = []
    for directory in datasets:
        dataset = LatentDataset(directory, "train")
        order = BatchOrder(dataset.buckets, 8, seed=1)
        batches.append(next(BatchLoader(dataset, order, 4, 0, 1, 8).steps(3, 4))[0])
        with dataset.autoencoder_source() as source:
            assert len(load_autoencoder(source).state_dict())
    disk, store = batches
    assert disk.clip_ids == store.clip_ids
    assert torch.equal(disk.latents, store.latents)
    assert torch.equal(disk.text["bytes"][0], store.text["bytes"][0])
    jobs = [tiny_job(directory, tmp_path / "job") for directory in datasets]
    assert jobs[0].fingerprint() == jobs[1].fingerprint()


def test_a_run_keeps_the_autoencoder_of_a_store(datasets, tmp_path):
    """So that its checkpoints can be exported where the store is not."""
    job = tiny_job(datasets[1], tmp_path / "run")
    write_record(job, LatentDataset(job.dataset, "train").manifest)
    kept = read_record(tmp_path / "run").config.autoencoder
    assert kept.source == str(tmp_path / "run" / "autoencoder")
    assert load_autoencoder(kept.source).identity.sha256 == kept.sha256


@pytest.mark.slow
def test_training_from_s3_gives_the_weights_of_training_from_a_folder(
    datasets, tmp_path, one_worker
):
    weights = []
    for name, dataset in zip(("disk", "s3"), datasets, strict=True):
        train(dataset, tmp_path / name, steps=2, validation={"every": 2, "samples": 2, "videos": 1})
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
        assert (tmp_path / name / "model" / "autoencoder" / "config.json").is_file()
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_damage_in_a_store_is_told_like_damage_on_disk(datasets, s3):
    _, address = datasets
    check_dataset(address)
    LatentDataset(address, "train").check_files()
    s3.put_object(Bucket="videos", Key="sets/latents/a.parquet", Body=b"short")
    with pytest.raises(UserError, match=r"latents/a.parquet has 5 bytes instead of \d+"):
        LatentDataset(address, "train").check_files()
    s3.delete_object(Bucket="videos", Key="sets/text/a.parquet")
    s3.delete_object(Bucket="videos", Key="sets/latents/a.parquet")
    with pytest.raises(UserError, match=r"latents/a.parquet is missing"):
        LatentDataset(address, "train").check_files()
    with pytest.raises(UserError, match=r"s3://videos/other has no manifest.json"):
        check_dataset("s3://videos/other")
