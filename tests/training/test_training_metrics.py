"""Figures of a log line, against the same written out."""

import pytest
import torch
from latent_dataset import train_settings

from streamdit.config import DiTConfig
from streamdit.model.flops import count_flops
from streamdit.text import TextStates
from training.data import Batch
from training.engine import World
from training.means import Means
from training.metrics import StepMeter, format_line
from training.objective import Mean

MODEL = DiTConfig.model_validate(
    train_settings()["model"]
    | {
        "buckets": [
            {"frames": 4, "height": 4, "width": 4, "window": [2, 2, 2]},
            {"frames": 4, "height": 4, "width": 8, "window": [2, 2, 2]},
        ]
    }
)


def batch(samples, width, text):
    states = TextStates(
        {"bytes": (torch.zeros(samples, text, 16), torch.ones(samples, text, dtype=torch.bool))}
    )
    latents = torch.zeros(samples, 4, 4, 4, width)
    return Batch(latents, states, states, ["c"] * samples, list(range(samples)))


def block_flops(bucket, text):
    """Of one of the model's two blocks, whose windows have as many tokens in both."""
    parts = count_flops(MODEL, bucket, text)
    outside = sum(parts[name] for name in ("patch_embedding", "time_embedding", "output"))
    outside += parts["text_projection"] + 2 * (2 * MODEL.buffer_frames * MODEL.width**2)
    return (parts["total"] - outside) / 2


@pytest.mark.parametrize(("recomputed", "teacher"), [(0, 0), (1, 0), (2, 0), (0, 32)])
def test_work_is_counted_by_bucket_text_and_passes(recomputed, teacher):
    meter = StepMeter(
        model=MODEL,
        world_size=4,
        device=torch.device("cpu"),
        peak=1e9,
        recomputed=recomputed,
    )
    meter.add(2.0, 0.5, [batch(3, 4, 7), batch(3, 4, 9)], [3 * teacher, 3 * teacher])
    meter.add(3.0, 0.0, [batch(2, 8, 7)], [2 * teacher])
    figures = meter.flush(steps_left=10)
    small, wide = MODEL.buckets
    forward = (
        3 * count_flops(MODEL, small, 7)["total"]
        + 3 * count_flops(MODEL, small, 9)["total"]
        + 2 * count_flops(MODEL, wide, 7)["total"]
    )
    assert figures["mfu"] == pytest.approx(forward * (3 + teacher) / 5.0 / 1e9)
    again = 3 * block_flops(small, 7) + 3 * block_flops(small, 9) + 2 * block_flops(wide, 7)
    hardware = forward * (3 + teacher) + recomputed * again
    assert figures["hfu"] == pytest.approx(hardware / 5.0 / 1e9)
    assert figures["model_tflops_per_device"] == pytest.approx(figures["mfu"] * 1e-3)
    assert figures["samples_per_s"] == pytest.approx(8 * 4 / 5.0)
    assert figures["tokens_per_s_per_device"] == pytest.approx((6 * 16 + 2 * 32) / 5.0)
    assert figures["data_wait_share"] == pytest.approx(0.1)
    assert figures["eta_s"] == pytest.approx(25.0)

    meter.add(1.0, 0.0, [batch(1, 4, 7)], [0])
    assert meter.flush(0)["samples_per_s"] == pytest.approx(4.0)


class TwoRanks(World):
    """A world whose other rank said something fixed."""

    def gather(self, value):
        return [value, {"loss": [30.0, 10.0], "only_there": [4.0, 2.0]}]


def test_means_are_over_micro_batches_and_ranks_by_weight():
    means = Means()
    means.add({"loss": Mean(torch.tensor(6.0), torch.tensor(2)), "plain": torch.tensor(1.0)})
    means.add({"loss": Mean(torch.tensor(8.0), torch.tensor(8)), "plain": torch.tensor(4.0)})
    means.add({"empty": Mean(torch.tensor(0.0), torch.tensor(0))})
    world = TwoRanks(rank=0, size=2, device=torch.device("cpu"))
    assert means.reduce(world) == {"loss": 44.0 / 20, "plain": 2.5, "only_there": 2.0}


def test_line_of_a_step_tells_learning_from_speed():
    row = {
        "step": 20,
        "loss": 1.5,
        "gradient_norm": 0.4567,
        "learning_rate": 1e-5,
        "samples_per_s": 156.64,
        "tokens_per_s_per_device": 1300.0,
        "model_tflops_per_device": 0.00123,
        "step_p50_s": 0.051,
        "step_p95_s": 0.056,
        "data_wait_share": 0.03,
        "peak_memory_gib": 0.94,
        "eta_s": 61.9,
    }
    step, figures = format_line(row, 100).split("/100  ")
    assert step == "step     20"
    assert figures.split("  ") == [
        *("loss 1.5000", "grad norm 0.457", "lr 1e-05", "156.6 samples/s"),
        *("1.3k tokens/s/device", "0.00123 TFLOP/s", "step p50 51 ms p95 56 ms"),
        *("data wait 3%", "0.9 GiB", "ETA 0:01:01"),
    ]
    held_out = format_line({"step": 20, "validation_loss": 1.7}, 100)
    assert held_out == "step     20/100  held-out 1.7000"
