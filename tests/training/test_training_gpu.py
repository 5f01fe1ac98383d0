"""What only a GPU has: bf16 kernels, the copying stream, utilisation of a known peak."""

import pytest
import torch
from latent_dataset import write_dataset
from training_runs import losses, tiny_job, train

from streamdit.io import load_model
from training.data import LatentDataset
from training.loader import BatchLoader
from training.metrics import device_peak_flops, read_metrics
from training.order import BatchOrder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


def test_bf16_run_follows_the_float32_run_and_reports_its_utilisation(dataset_dir, tmp_path):
    for precision in ("float32", "bfloat16"):
        train(dataset_dir, tmp_path / precision, precision=precision)
    expected = losses(tmp_path / "float32")
    assert losses(tmp_path / "bfloat16") == pytest.approx(expected, rel=0.05)
    rows = [row for row in read_metrics(tmp_path / "bfloat16/metrics.jsonl") if "loss" in row]
    if device_peak_flops(torch.device("cuda")) is None:
        pytest.skip("the peak of this GPU is not known")
    assert all(0 < row["mfu"] == row["hfu"] < 1 for row in rows)
    assert all(0 < row["peak_memory_gib"] < 8 for row in rows)


def test_sharded_parameters_and_recomputed_activations_give_the_same_losses(dataset_dir, tmp_path):
    train(dataset_dir, tmp_path / "plain")
    options = {"zero_stage": 3, "activation_checkpointing": True}
    train(dataset_dir, tmp_path / "sharded", **options)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    model, _ = load_model(tmp_path / "sharded/model")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_run_resumed_on_the_gpu_continues_where_it_stood(dataset_dir, tmp_path):
    train(dataset_dir, tmp_path / "straight")
    train(dataset_dir, tmp_path / "broken", crash_at=4)
    train(dataset_dir, tmp_path / "broken")
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "straight"), rel=1e-3)


def test_batches_copied_ahead_hold_what_batches_of_the_cpu_hold(dataset_dir, tmp_path):
    """While the device is kept busy, so that a copy that nobody waited for would show."""
    job = tiny_job(dataset_dir, tmp_path)
    dataset = LatentDataset(dataset_dir, "train")
    order = BatchOrder(dataset.buckets, 8, seed=0)

    def steps(device):
        loader = BatchLoader(dataset, order, job.model.buffer_frames, 0, 1, 4, job.config.data)
        return loader.steps(0, 6, device)

    busy = torch.randn(2048, 2048, device="cuda")
    pairs = zip(steps(torch.device("cpu")), steps(torch.device("cuda")), strict=True)
    for expected, found in pairs:
        for _ in range(20):
            busy = (busy @ busy).tanh()
        for here, there in zip(expected, found, strict=True):
            assert there.latents.is_cuda
            doubled = there.latents * 2  # on the device, behind its queue
            assert torch.equal(doubled.cpu(), here.latents * 2)
            assert there.clip_ids == here.clip_ids
