"""Multistep distillation against teachers whose answer is known in closed form."""

import pytest
import torch

from distillation.objective import (
    MultistepDistillation,
    average_velocity,
    segment_levels,
    teacher_rollout,
)
from streamdit.config import GammaConfig
from streamdit.flow import per_frame
from streamdit.partition import PartitionScheme
from streamdit.text import TextStates
from training.data import Batch
from training.objective import stack_draws

SHAPE = (8, 2, 3, 3)
SPREAD = 0.5
LINEAR = GammaConfig()


def states(value, batch):
    return TextStates(
        {"t": (torch.full((batch, 1, 1), value), torch.ones(batch, 1, dtype=torch.bool))}
    )


def batch_of(latents):
    count = len(latents)
    return Batch(latents, states(1.0, count), states(0.0, 1), ["c"] * count, list(range(count)))


def gaussian_teacher(latents, tau, text):
    """Exact velocity for data ~ N(0, SPREAD^2) per voxel."""
    t = per_frame(tau)
    variance = (t * SPREAD).square() + (1 - t).square()
    return (t * SPREAD**2 - (1 - t)) / variance * latents


def width_of_path(tau):
    """Standard deviation of the path; the exact flow scales a point in proportion to it."""
    return ((tau * SPREAD).square() + (1 - tau).square()).sqrt()


def draws_for(objective, count, seed=0):
    return stack_draws(
        [
            objective.draw(torch.Size(SHAPE), torch.Generator().manual_seed(seed + index))
            for index in range(count)
        ]
    )


def distillation(teacher, scheme, w=1.0, uniform=0.2, gamma=LINEAR):
    return MultistepDistillation(teacher, scheme, gamma, 0.0, w, uniform)


@pytest.mark.parametrize("gamma", [GammaConfig(), GammaConfig(kind="exponential", power=2.0)])
def test_target_of_a_gaussian_teacher_is_the_exact_average_velocity(gamma):
    scheme = PartitionScheme(K=0, N=4, c=2, s=400)
    start = torch.randn(3, *SHAPE)
    segments = scheme.segments().expand(3, -1)
    tau, end_tau = (segment_levels(segments, scheme, m, gamma) for m in (0, scheme.s))
    text = states(1.0, 3)
    end = teacher_rollout(
        gaussian_teacher, start, segments, scheme, gamma, text, states(0.0, 1), 1.0
    )
    exact = start * per_frame(width_of_path(end_tau) / width_of_path(tau))
    torch.testing.assert_close(end, exact, rtol=0.01, atol=0.01)
    target = average_velocity(start, end, tau, end_tau)
    torch.testing.assert_close(
        target, (exact - start) / per_frame(end_tau - tau), rtol=0.02, atol=0.03
    )


def test_one_unguided_step_makes_the_teacher_its_own_perfect_student():
    objective = distillation(gaussian_teacher, PartitionScheme(K=0, N=4, c=2, s=1))
    loss, _ = objective(gaussian_teacher, batch_of(torch.randn(4, *SHAPE)), draws_for(objective, 4))
    assert loss < 1e-10


def test_a_student_with_enough_capacity_reaches_the_target():
    """For this teacher the average velocity is one factor per level, which a table can hold."""
    scheme = PartitionScheme(K=0, N=4, c=2, s=64)
    objective = distillation(gaussian_teacher, scheme, uniform=0.5)
    factors = torch.zeros(scheme.N, requires_grad=True)
    optimizer = torch.optim.Adam([factors], lr=0.05)

    def student(latents, tau, text):
        return per_frame(factors[(tau * scheme.N).round().long()]) * latents

    for step in range(150):
        latents = SPREAD * torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(step))
        loss, _ = objective(student, batch_of(latents), draws_for(objective, 8, seed=1000 * step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    levels = torch.arange(scheme.N + 1) / scheme.N
    scales = width_of_path(levels)
    exact = (scales[1:] / scales[:-1] - 1) * scheme.N
    torch.testing.assert_close(factors.detach(), exact, rtol=0.03, atol=0.03)
    assert loss < 1e-3


def test_guidance_is_folded_into_the_target():
    """With velocity equal to the prompt's number, w = 3 between 0 and 1 gives 3."""
    scheme = PartitionScheme(K=0, N=4, c=2, s=5)

    def teacher(latents, tau, text):
        return torch.zeros_like(latents) + text["t"][0][:, :, None, None]

    objective = distillation(teacher, scheme, w=3.0)
    latents = torch.randn(2, *SHAPE)
    seen = []

    def student(x, tau, text):
        seen.append(x.shape[0])
        return torch.full_like(x, 3.0)

    loss, _ = objective(student, batch_of(latents), draws_for(objective, 2))
    assert loss < 1e-9
    assert seen == [2], "the student is evaluated once, without the empty prompt"


def test_reference_frames_stay_and_carry_no_loss():
    scheme = PartitionScheme(K=2, N=3, c=2, s=4)
    objective = distillation(gaussian_teacher, scheme, uniform=0.0)
    latents = torch.randn(2, *SHAPE)

    def student(x, tau, text):
        assert torch.equal(x[:, :2], latents[:, :2])
        answer = torch.zeros_like(x)
        answer[:, :2] = 1e6
        return answer

    loss, _ = objective(student, batch_of(latents), draws_for(objective, 2))
    assert loss < 10


def test_share_of_uniform_buffers_puts_all_frames_into_one_segment():
    scheme = PartitionScheme(K=0, N=4, c=2, s=4)
    draws = draws_for(distillation(gaussian_teacher, scheme, uniform=0.25), 800)
    uniform = draws["uniform"]
    assert abs(uniform.float().mean() - 0.25) < 0.05
    rows = draws["segments"][uniform]
    assert torch.all(rows == rows[:, :1])
    assert set(rows[:, 0].tolist()) == {1, 2, 3, 4}
    assert torch.all(draws["segments"][~uniform] == scheme.segments())
