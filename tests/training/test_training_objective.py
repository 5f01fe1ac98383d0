"""Buffered flow matching as an objective."""

import math
from types import SimpleNamespace

import pytest
import torch
from no_host_reads import NoHostReads

from jobs.config import load_config
from streamdit.config import GammaConfig, PartitionConfig, PartitionEntry
from streamdit.flow import interpolate
from streamdit.text import TextStates
from training.config import OptimizerConfig, TrainConfig
from training.data import Batch
from training.objective import FlowMatching, make_flow_matching, stack_draws
from training.schedule import learning_rate
from training.weighting import noise_weights


def states(value, batch):
    return TextStates(
        {"t": (torch.full((batch, 1, 1), value), torch.ones(batch, 1, dtype=torch.bool))}
    )


def batch_of(latents):
    count = len(latents)
    return Batch(latents, states(1.0, count), states(0.0, 1), ["c"] * count, list(range(count)))


def objective(*entries, dropout=0.0, sigma_min=0.0, device=None):
    parts = tuple(PartitionEntry(chunk_frames=c, reference_frames=k) for k, c in entries)
    return FlowMatching(PartitionConfig(entries=parts, sigma_min=sigma_min), 4, dropout, device)


def draws_for(objective, latents, seed=0):
    return stack_draws(
        [
            objective.draw(latents.shape[1:], torch.Generator().manual_seed(seed + index))
            for index in range(len(latents))
        ]
    )


def test_loss_is_the_squared_error_of_the_velocity_written_out():
    latents = torch.randn(3, 4, 2, 3, 3)
    flow = objective((0, 1), (0, 2), (0, 4), sigma_min=0.1)
    draws = draws_for(flow, latents)
    seen = {}

    def student(x, tau, text):
        seen["x"], seen["tau"] = x, tau
        return 0.5 * x

    loss, figures = flow(student, batch_of(latents), draws)
    metrics = figures()
    total = 0.0
    for b in range(3):
        for f in range(4):
            t, noise = draws["tau"][b, f], draws["noise"][b, f]
            x = t * latents[b, f] + (1 - 0.9 * t) * noise
            torch.testing.assert_close(seen["x"][b, f], x)
            total += (0.5 * x - (latents[b, f] - 0.9 * noise)).square().mean()
    torch.testing.assert_close(loss, total / 12)
    for part in ("chunk", "segment"):
        parts = [mean for name, mean in metrics.items() if name.startswith(f"loss_{part}_")]
        whole = sum(mean.total for mean in parts) / sum(mean.weight for mean in parts)
        torch.testing.assert_close(whole, loss)


def test_the_true_velocity_has_no_loss():
    latents = torch.randn(2, 4, 2, 3, 3)
    flow = objective((1, 3))
    draws = draws_for(flow, latents)
    loss, _ = flow(lambda x, tau, text: latents - draws["noise"], batch_of(latents), draws)
    assert loss == 0


def test_reference_frames_are_clean_and_carry_no_loss():
    latents = torch.randn(2, 4, 2, 3, 3)
    flow = objective((2, 1))
    draws = draws_for(flow, latents)

    def student(x, tau, text):
        assert torch.equal(x[:, :2], latents[:, :2])
        assert torch.all(tau[:, :2] == 1)
        wrong = latents - draws["noise"]
        wrong[:, :2] += 100.0
        return wrong

    loss, _ = flow(student, batch_of(latents), draws)
    assert loss == 0


def test_captions_are_dropped_at_the_stated_share():
    latents = torch.randn(500, 4, 1, 1, 1)
    flow = objective((0, 4), dropout=0.3)
    seen = {}

    def student(x, tau, text):
        seen["kept"] = text["t"][0][:, 0, 0]
        return x

    flow(student, batch_of(latents), draws_for(flow, latents))
    assert set(seen["kept"].tolist()) == {0.0, 1.0}
    assert abs(1 - seen["kept"].mean() - 0.3) < 0.06


def test_a_dropped_caption_is_the_empty_one_whatever_the_lengths():
    captions = TextStates.collate([{"t": torch.full((n, 2), float(n))} for n in (3, 5, 4)])
    empty = TextStates.collate([{"t": torch.full((6, 2), -1.0)}])
    longer = captions.where(torch.tensor([True, False, True]), empty)
    assert longer["t"][0].shape == (3, 6, 2)
    found = [sample["t"] for sample in longer.unpadded()]
    for states_of, count, value in zip(found, (3, 6, 4), (3.0, -1.0, 4.0), strict=True):
        assert torch.equal(states_of, torch.full((count, 2), value))
    full = TextStates({"t": (torch.ones(2, 6, 2), None)})
    values, mask = full.where(torch.tensor([False, True]), empty)["t"]
    assert mask is None
    assert values[:, 0, 0].tolist() == [-1.0, 1.0]


def test_a_loss_makes_the_host_wait_for_no_tensor():
    """On a device that has no values to wait for."""
    flow = objective((0, 1), (0, 4), dropout=0.5, device=torch.device("meta"))
    latents = torch.randn(3, 4, 2, 3, 3)
    draws = {name: value.to("meta") for name, value in draws_for(flow, latents).items()}
    with NoHostReads():
        loss, figures = flow(
            lambda x, tau, text: x * text["t"][0][:, :, None, None],
            batch_of(latents).to(torch.device("meta")),
            draws,
        )
        figures()
    assert loss.device.type == "meta"


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    latents = torch.randn(4, 4, 2, 3, 3)
    flow = objective((0, 1), (0, 4), dropout=0.5)
    whole, part = draws_for(flow, latents), draws_for(flow, latents[2:], seed=2)
    for name, values in part.items():
        assert torch.equal(whole[name][2:], values)


def test_learning_rate_rises_then_falls_along_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_share=0.1)
    assert [learning_rate(config, step, 104) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 4, 104) == 1.0
    assert learning_rate(config, 54, 104) == pytest.approx(0.55)
    assert learning_rate(config, 104, 104) == pytest.approx(0.1)
    constant = OptimizerConfig(learning_rate=1.0)
    assert learning_rate(constant, 99, 100) == 1.0


def test_losses_are_reported_by_chunk_size_and_by_noise_segment():
    """Against sums over single frames, with a schedule that bends the segments."""
    gamma = GammaConfig(kind="exponential", power=2.0)
    entries = (PartitionEntry(chunk_frames=1), PartitionEntry(chunk_frames=1, reference_frames=2))
    flow = FlowMatching(PartitionConfig(entries=entries, gamma=gamma), 4, 0.0)
    latents = torch.randn(40, 4, 2, 3, 3)
    draws = draws_for(flow, latents)
    _, figures = flow(lambda x, tau, text: 0.3 * x, batch_of(latents), draws)
    metrics = figures()
    error = (
        0.3 * interpolate(latents, draws["noise"], draws["tau"]) - latents + draws["noise"]
    ) ** 2
    for segment in range(1, 5):
        low, high = ((segment - 1) / 4) ** 2, (segment / 4) ** 2
        inside = [
            error[b, f].mean() * draws["weight"][b, f]
            for b in range(40)
            for f in range(4)
            if low <= draws["tau"][b, f] < high and draws["weight"][b, f] > 0
        ]
        found = metrics[f"loss_segment_{segment}"]
        torch.testing.assert_close(found.total, torch.stack(inside).sum())
        assert found.weight > 0
    assert "loss_segment_5" not in metrics
    assert [name for name in metrics if "chunk" in name] == ["loss_chunk_1"]


def test_reference_frames_and_weights_of_the_mixture_are_drawn_as_configured():
    entries = (
        PartitionEntry(chunk_frames=1, weight=1.0),
        PartitionEntry(chunk_frames=4, weight=3.0),
        PartitionEntry(chunk_frames=1, reference_frames=2, weight=4.0),
    )
    flow = FlowMatching(PartitionConfig(entries=entries), 4, 0.0)
    draws = draws_for(flow, torch.randn(800, 4, 1, 1, 1))
    whole_buffer = (draws["chunk_frames"] == 4).float().mean()
    referenced = (draws["weight"][:, 0] == 0).float().mean()
    assert abs(whole_buffer - 3 / 8) < 0.05  # the share of text-to-video samples
    assert abs(referenced - 4 / 8) < 0.05


@pytest.mark.parametrize("weighting", ["uniform", "logit-normal", "cosmap"])
def test_weights_by_noise_level_are_densities(weighting):
    """Their mean over the path is 1."""
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    weights = noise_weights(weighting, tau)
    assert weights.mean() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(weights, weights.flip(0))
    ends = noise_weights(weighting, torch.tensor([0.0, 1.0, 0.5]))
    middle = {"uniform": 1.0, "logit-normal": 4 / math.sqrt(2 * math.pi), "cosmap": 4 / math.pi}
    end = {"uniform": 1.0, "logit-normal": 0.0, "cosmap": 2 / math.pi}
    torch.testing.assert_close(ends, torch.tensor([end[weighting]] * 2 + [middle[weighting]]))


def test_logit_normal_weights_are_the_density_of_a_normal_through_a_sigmoid():
    drawn = torch.sigmoid(torch.randn(400_000, generator=torch.Generator().manual_seed(0)))
    counts = torch.histc(drawn, bins=20, min=0, max=1) / len(drawn) * 20
    inside = noise_weights("logit-normal", (torch.arange(20_000) + 0.5) / 20_000)
    torch.testing.assert_close(counts, inside.view(20, 1000).mean(dim=1), atol=0.03, rtol=0)


def test_the_loss_is_weighted_by_noise_level_and_its_figures_are_not():
    job = SimpleNamespace(
        config=load_config(
            TrainConfig, stage="train", preset="demo", overrides=["loss_weighting=cosmap"]
        ),
        model=SimpleNamespace(buffer_frames=4),
        partition=PartitionConfig(entries=(PartitionEntry(chunk_frames=1, reference_frames=2),)),
    )
    weighted = make_flow_matching(job, torch.device("cpu"))
    latents = torch.randn(5, 4, 2, 3, 3)
    draws = draws_for(weighted, latents)
    plain = FlowMatching(job.partition, 4, job.config.caption_dropout)
    loss, figures = weighted(lambda x, tau, text: 0.3 * x, batch_of(latents), draws)
    _, expected = plain(lambda x, tau, text: 0.3 * x, batch_of(latents), draws)
    assert figures() == expected()
    x = interpolate(latents, draws["noise"], draws["tau"])
    error = (0.3 * x - latents + draws["noise"]).square().mean(dim=(2, 3, 4)) * draws["weight"]
    tau = draws["tau"]
    by_hand = error * 2 / (math.pi * ((1 - tau) ** 2 + tau**2))
    torch.testing.assert_close(loss, by_hand.mean())
