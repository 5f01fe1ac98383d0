"""Buffered flow matching as an objective."""

import pytest
import torch

from streamdit.config import PartitionConfig, PartitionEntry
from streamdit.text import TextStates
from training.config import OptimizerConfig
from training.data import Batch
from training.objective import FlowMatching, stack_draws
from training.schedule import learning_rate


def states(value, batch):
    return TextStates(
        {"t": (torch.full((batch, 1, 1), value), torch.ones(batch, 1, dtype=torch.bool))}
    )


def batch_of(latents):
    count = len(latents)
    return Batch(latents, states(1.0, count), states(0.0, 1), ["c"] * count, list(range(count)))


def objective(*entries, dropout=0.0, sigma_min=0.0):
    parts = tuple(PartitionEntry(chunk_frames=c, reference_frames=k) for k, c in entries)
    return FlowMatching(PartitionConfig(entries=parts, sigma_min=sigma_min), 4, dropout)


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

    loss, metrics = flow(student, batch_of(latents), draws)
    total = 0.0
    for b in range(3):
        for f in range(4):
            t, noise = draws["tau"][b, f], draws["noise"][b, f]
            x = t * latents[b, f] + (1 - 0.9 * t) * noise
            torch.testing.assert_close(seen["x"][b, f], x)
            total += (0.5 * x - (latents[b, f] - 0.9 * noise)).square().mean()
    torch.testing.assert_close(loss, total / 12)
    chunks = draws["chunk_frames"].tolist()
    mean = sum(metrics[f"loss_chunk_{c}"] * chunks.count(c) for c in set(chunks)) / 3
    torch.testing.assert_close(mean, loss)


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
