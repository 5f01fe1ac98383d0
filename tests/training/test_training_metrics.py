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
from training.metrics import StepMeter
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


@pytest.mark.parametrize(("recompute", "teacher"), [(False, 0), (True, 0), (False, 32)])
def test_work_is_counted_by_bucket_text_and_passes(recompute, teacher):
    meter = StepMeter(
        model=MODEL,
        world_size=4,
        device=torch.device("cpu"),
        peak=1e9,
        recompute=recompute,
        teacher_forwards=teacher,
    )
    meter.add(2.0, 0.5, [batch(3, 4, 7), batch(3, 4, 9)])
    meter.add(3.0, 0.0, [batch(2, 8, 7)])
    figures = meter.flush(steps_left=10)
    small, wide = MODEL.buckets
    forward = (
        3 * count_flops(MODEL, small, 7)["total"]
        + 3 * count_flops(MODEL, small, 9)["total"]
        + 2 * count_flops(MODEL, wide, 7)["total"]
    )
    assert figures["mfu"] == pytest.approx(forward * (3 + teacher) / 5.0 / 1e9)
    assert figures["hfu"] == pytest.approx(forward * (3 + teacher + recompute) / 5.0 / 1e9)
    assert figures["model_tflops_per_device"] == pytest.approx(figures["mfu"] * 1e-3)
    assert figures["samples_per_s"] == pytest.approx(8 * 4 / 5.0)
    assert figures["tokens_per_s_per_device"] == pytest.approx((6 * 16 + 2 * 32) / 5.0)
    assert figures["data_wait_share"] == pytest.approx(0.1)
    assert figures["eta_s"] == pytest.approx(25.0)

    meter.add(1.0, 0.0, [batch(1, 4, 7)])
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
