"""Multistep distillation against teachers whose answer is known in closed form."""

import pickle

import pytest
import torch
from fast_step import SHAPE as FAST_SHAPE
from fast_step import model_for, prompt

from distillation.config import DriftConfig
from distillation.objective import MultistepDistillation
from distillation.plan import KINDS, RolloutPlan
from distillation.rollout import LiveRollouts, average_velocity, teacher_walk
from streamdit.config import GammaConfig
from streamdit.flow import interpolate, per_frame
from streamdit.partition import PartitionScheme
from streamdit.text import TextStates
from training.data import Batch
from training.engine import World
from training.means import Means
from training.objective import stack_draws

SHAPE = (8, 2, 3, 3)
SPREAD = 0.5
LINEAR = GammaConfig()


class Alone(World):
    """A world of one that needs no process group."""

    def gather(self, value):
        return [value]


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


def text_teacher(latents, tau, text):
    """Velocity 1 under a prompt, 0 under the empty one."""
    return torch.zeros_like(latents) + text["t"][0][:, :, None, None]


def width_of_path(tau):
    """Standard deviation of the path; the exact flow scales a point in proportion to it."""
    return ((tau * SPREAD).square() + (1 - tau).square()).sqrt()


def plan_for(scheme, w=1.0, uniform=0.2, gamma=LINEAR, ramp=0.0, continued=0.0, drift=None):
    guidance = w if isinstance(w, tuple) else (w,) * scheme.N
    drift = drift or DriftConfig()
    return RolloutPlan(scheme, gamma, 0.0, guidance, uniform, ramp, continued, drift)


def distillation(teacher, scheme, weights=None, **options):
    plan = plan_for(scheme, **options)
    return MultistepDistillation(LiveRollouts(teacher, plan), plan, weights)


def draws_for(objective, count, seed=0, progress=0.0):
    return stack_draws(
        [
            objective.draw(torch.Size(SHAPE), torch.Generator().manual_seed(seed + index), progress)
            for index in range(count)
        ]
    )


def test_figures_weigh_each_kind_of_buffer_by_its_samples():
    """Two micro-batches give the mean over all their samples of a kind, not a mean of means."""
    objective = distillation(gaussian_teacher, PartitionScheme(0, 4, 2, 2), uniform=0.3, ramp=0.3)
    means, parts = Means(), {name: [] for name in KINDS}
    for seed, count in ((0, 3), (50, 9)):
        draws = draws_for(objective, count, seed)
        latents = torch.randn(count, *SHAPE)
        _, figures = objective(lambda x, tau, text: 0.1 * x, batch_of(latents), draws)
        means.add(figures())
        for row in range(count):
            one = {name: value[row : row + 1] for name, value in draws.items()}
            loss, _ = objective(lambda x, tau, text: 0.1 * x, batch_of(latents[row][None]), one)
            parts[KINDS[draws["kind"][row]]].append(float(loss))
    found = means.reduce(Alone(rank=0, size=1, device=torch.device("cpu")))
    assert [name for name, losses in parts.items() if losses] == ["staircase", "uniform", "ramp"]
    by_kind = {name: value for name, value in found.items() if "segment" not in name}
    assert by_kind == pytest.approx(
        {f"loss_{name}": sum(of) / len(of) for name, of in parts.items() if of}, rel=1e-5
    )


def test_draws_travel_to_loader_processes_without_the_teacher():
    teacher = torch.nn.Linear(1000, 1000)
    objective = distillation(teacher, PartitionScheme(0, 4, 2, 2), uniform=0.3)
    sent = pickle.dumps(objective.draw)
    assert len(sent) < 10_000
    expected = objective.draw(torch.Size(SHAPE), torch.Generator().manual_seed(3), 0.5)
    found = pickle.loads(sent)(torch.Size(SHAPE), torch.Generator().manual_seed(3), 0.5)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("gamma", [GammaConfig(), GammaConfig(kind="exponential", power=2.0)])
@pytest.mark.parametrize("scheme", [PartitionScheme(0, 4, 2, 400), PartitionScheme(2, 3, 2, 400)])
def test_target_of_a_gaussian_teacher_is_the_exact_average_velocity(scheme, gamma):
    plan = plan_for(scheme, gamma=gamma)
    start = torch.randn(3, *SHAPE)
    positions = scheme.positions().expand(3, -1)
    moving = scheme.segments().expand(3, -1) > 0
    way = teacher_walk(
        gaussian_teacher, start, positions, moving, plan, states(1.0, 3), states(0.0, 1)
    )
    tau, end_tau = plan.levels(positions, moving, 0), plan.levels(positions, moving, scheme.s)
    exact = start * per_frame(width_of_path(end_tau) / width_of_path(tau))
    torch.testing.assert_close(start + way, exact, rtol=0.01, atol=0.01)
    target = average_velocity(way, tau, end_tau)
    width = per_frame(end_tau - tau)
    expected = torch.where(width > 0, (exact - start) / width.clamp(min=1e-9), 0.0)
    torch.testing.assert_close(target, expected, rtol=0.02, atol=0.03)


def test_targets_of_narrow_segments_are_as_precise_as_those_of_wide_ones():
    """The first of 16 segments is 16^-5 wide; a difference of latents would lose a tenth of it."""
    scheme = PartitionScheme(K=0, N=16, c=1, s=16)
    plan = plan_for(scheme, gamma=GammaConfig(kind="exponential", power=5.0))
    positions = torch.zeros(1, 16, dtype=torch.long)
    moving = torch.ones(1, 16, dtype=torch.bool)
    start = 1.0 + torch.rand(1, 16, *SHAPE[1:])

    def teacher(latents, tau, text):
        return torch.full_like(latents, 0.3)

    way = teacher_walk(teacher, start, positions, moving, plan, states(1.0, 1), states(0.0, 1))
    tau, end_tau = plan.levels(positions, moving, 0), plan.levels(positions, moving, scheme.s)
    assert 0 < (end_tau - tau).max() < 1e-6
    target = average_velocity(way, tau, end_tau)
    torch.testing.assert_close(target, torch.full_like(target, 0.3), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("gamma", [GammaConfig(), GammaConfig(kind="exponential", power=3.0)])
@pytest.mark.parametrize("ramp", [0.0, 0.4])
def test_one_unguided_step_makes_the_teacher_its_own_perfect_student(gamma, ramp):
    scheme = PartitionScheme(K=0, N=4, c=2, s=1)
    objective = distillation(gaussian_teacher, scheme, gamma=gamma, ramp=ramp)
    loss, _ = objective(gaussian_teacher, batch_of(torch.randn(9, *SHAPE)), draws_for(objective, 9))
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
    objective = distillation(text_teacher, PartitionScheme(K=0, N=4, c=2, s=5), w=3.0)
    seen = []

    def student(x, tau, text):
        seen.append(x.shape[0])
        return torch.full_like(x, 3.0)

    loss, _ = objective(student, batch_of(torch.randn(2, *SHAPE)), draws_for(objective, 2))
    assert loss < 1e-9
    assert seen == [2], "the student is evaluated once, without the empty prompt"


def test_each_segment_can_have_its_own_guidance():
    """Segment i = 1 (noisiest) ... 4 has weight 1 ... 4, and so has the target."""
    scheme = PartitionScheme(K=0, N=4, c=2, s=3)
    plan = plan_for(scheme, w=(1.0, 2.0, 3.0, 4.0), uniform=0.5)
    source = LiveRollouts(text_teacher, plan)
    objective = MultistepDistillation(source, plan)
    draws = draws_for(objective, 12)
    rollout = source(None, batch_of(torch.randn(12, *SHAPE)), draws)
    expected = per_frame(draws["positions"] // scheme.s + 1.0).expand_as(rollout.target)
    torch.testing.assert_close(rollout.target, expected, rtol=1e-4, atol=1e-4)
    staircase = rollout.target[draws["kind"] == 0][0, :, 0, 0, 0]
    assert staircase.round().tolist() == [4, 4, 3, 3, 2, 2, 1, 1]


def test_loss_of_each_segment_has_its_weight_and_is_reported_without():
    """A student that is wrong by one in one segment only pays that segment's weight."""
    scheme = PartitionScheme(K=0, N=4, c=2, s=1)
    weights = (1.0, 2.0, 3.0, 10.0)
    objective = distillation(gaussian_teacher, scheme, weights=weights, uniform=0.0)
    draws, batch = draws_for(objective, 2), batch_of(torch.randn(2, *SHAPE))
    for segment, weight in enumerate(weights, start=1):

        def student(x, tau, text, segment=segment):
            wrong = (scheme.segments() == segment).float()
            return gaussian_teacher(x, tau, text) + per_frame(wrong)

        loss, figures = objective(student, batch, draws)
        torch.testing.assert_close(loss.item(), weight / 4 / 4, rtol=1e-4, atol=1e-6)
        means = Means()
        means.add(figures())
        found = means.reduce(Alone(rank=0, size=1, device=torch.device("cpu")))
        by_segment = [found[f"loss_segment_{number}"] for number in range(1, 5)]
        expected = [float(number == segment) for number in range(1, 5)]
        assert by_segment == pytest.approx(expected, abs=1e-4)


def test_references_and_frames_that_wait_belong_to_no_segment():
    scheme = PartitionScheme(K=2, N=3, c=2, s=4)
    objective = distillation(gaussian_teacher, scheme, uniform=0.0, ramp=1.0)
    draws, batch = draws_for(objective, 6), batch_of(torch.randn(6, *SHAPE))
    _, figures = objective(lambda x, tau, text: torch.zeros_like(x), batch, draws)
    counted = {name: mean.weight for name, mean in figures().items() if "segment" in name}
    assert sum(map(int, counted.values())) == int(objective.source(None, batch, draws).moving.sum())


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
    uniform = draws["kind"] == 1
    assert abs(uniform.float().mean() - 0.25) < 0.05
    rows = draws["positions"][uniform]
    assert torch.all(rows == rows[:, :1])
    assert set(rows[:, 0].tolist()) == {0, 4, 8, 12}
    assert torch.all(draws["positions"][~uniform] == scheme.positions())


def test_share_of_ramp_buffers_holds_every_stage_of_the_start_and_waiting_frames_rest():
    scheme = PartitionScheme(K=0, N=4, c=1, s=2)
    draws = draws_for(distillation(gaussian_teacher, scheme, uniform=0.0, ramp=0.5), 400)
    rows = {tuple(row) for row in draws["positions"][draws["kind"] == 2].tolist()}
    assert rows == {(6, 4, 2, 0), (4, 2, 0, 0), (2, 0, 0, 0), (0, 0, 0, 0)}
    for row, moving in zip(draws["positions"].tolist(), draws["moving"].tolist(), strict=True):
        if row == [4, 2, 0, 0]:
            assert moving == [True, True, True, False]


def test_continued_buffers_fill_behind_clean_references_with_the_exact_target():
    """Every stage of the start behind a given video, and the teacher's answer to each."""
    scheme = PartitionScheme(K=2, N=3, c=2, s=300)
    objective = distillation(gaussian_teacher, scheme, uniform=0.2, continued=0.5)
    draws = draws_for(objective, 40)
    continued = draws["kind"] == 3
    assert abs(continued.float().mean() - 0.5) < 0.2
    rows = {tuple(row) for row in draws["positions"][continued].tolist()}
    assert rows == {(900, 900, *(300 * segment,) * 6) for segment in range(3)}
    assert draws["moving"][continued].tolist() == [[False] * 2 + [True] * 6] * int(continued.sum())
    latents = torch.randn(40, *SHAPE)
    rollout = objective.source(None, batch_of(latents), draws)
    start, target = rollout.start[continued], rollout.target[continued]
    assert torch.equal(start[:, :2], latents[continued][:, :2])
    assert torch.all(target[:, :2] == 0)
    tau = draws["positions"][continued][:, 2:] / 900
    factor = (width_of_path(tau + 1 / 3) / width_of_path(tau) - 1) * 3
    expected = per_frame(factor) * start[:, 2:]
    torch.testing.assert_close(target[:, 2:], expected, rtol=0.02, atol=0.03)


def test_buffers_are_clips_noised_to_their_levels():
    """What a video that a stream follows is noised to, and what the first video passes."""
    scheme = PartitionScheme(K=0, N=4, c=2, s=4)
    plan = plan_for(scheme, uniform=0.5)
    source = LiveRollouts(gaussian_teacher, plan)
    draws = draws_for(source, 8)
    latents = torch.randn(8, *SHAPE)
    rollout = source(None, batch_of(latents), draws)
    tau = draws["positions"] / scheme.total_steps
    torch.testing.assert_close(rollout.start, interpolate(latents, draws["noise"], tau))


def drifting(chunks=4, **shares):
    points = {name: ((0.0, share),) for name, share in shares.items()}
    return DriftConfig(chunks=chunks, **points)


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_drifted_buffer_is_what_the_stream_of_that_model_holds(who, references):
    """Against the sampler itself: its buffer after as many chunks, from the same noise."""
    from streamdit.denoiser import Denoiser

    frames = (references, (8 - references) // 2, 2)  # K, N, c
    scheme = PartitionScheme(*frames, s=3)

    def student(latents, tau, text):
        return 0.3 * latents.sin()

    # Twelve chunks turn the buffer of four over three times.
    plan = plan_for(scheme, w=2.0, uniform=0.0, drift=drifting(12, **{who: 1.0}))

    def teacher(latents, tau, text):
        return gaussian_teacher(latents, tau, text) + 0.1 * text["t"][0][:, :, None, None]

    source = LiveRollouts(teacher, plan)
    draws = draws_for(source, 3)
    batch = batch_of(torch.randn(3, *SHAPE))
    rollout = source(student, batch, draws)
    for row in range(3):
        moves = int(draws["moved_chunks"][row])
        model, steps, w = (teacher, 3, 2.0) if who == "teacher" else (student, 1, 1.0)
        denoiser = Denoiser(model, PartitionScheme(*frames, steps), SHAPE[1:], [0], None, w)
        denoiser.set_text(states(1.0, 1), states(0.0, 1))
        while denoiser.filling:
            denoiser.step()
        noise = draws["noise"][row : row + 1]
        denoiser._buffer = interpolate(batch.latents[row : row + 1], noise[:, :8], scheme.levels(0))
        denoiser._noise = lambda first, count, n=noise: n[:, first : first + count]
        for _ in range(moves * steps):
            denoiser.step()
        torch.testing.assert_close(rollout.start[row : row + 1], denoiser.buffer)


def test_drift_comes_in_and_goes_over_the_course_of_a_run():
    drift = DriftConfig(
        teacher=((0.0, 0.0), (0.5, 0.4), (1.0, 0.0)), student=((0.5, 0.0), (1.0, 0.8))
    )
    objective = distillation(gaussian_teacher, PartitionScheme(0, 4, 2, 2), drift=drift)
    shares = {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        draws = draws_for(objective, 600, progress=progress)
        staircase = draws["kind"] == 0
        origin = draws["origin"][staircase]
        assert torch.all(draws["origin"][~staircase] == 0)
        shares[progress] = [float((origin == index).float().mean()) for index in (1, 2)]
    expected = {0.0: (0, 0), 0.25: (0.2, 0), 0.5: (0.4, 0), 1.0: (0, 0.8)}
    for progress, pair in expected.items():
        assert shares[progress] == pytest.approx(pair, abs=0.06)


def test_every_worker_evaluates_the_models_equally_often_whatever_it_drew():
    """Sharded weights are gathered by all together, so a worker must not skip an evaluation."""
    drift = drifting(3, teacher=0.3, student=0.3)
    scheme = PartitionScheme(0, 4, 2, 2)
    counts = set()
    for seed in range(12):
        calls = {"teacher": 0, "student": 0}

        def teacher(latents, tau, text, calls=calls):
            calls["teacher"] += 1
            return latents

        def student(latents, tau, text, calls=calls):
            calls["student"] += 1
            return latents

        objective = distillation(teacher, scheme, w=2.0, drift=drift)
        objective(student, batch_of(torch.randn(2, *SHAPE)), draws_for(objective, 2, seed=9 * seed))
        counts.add(tuple(calls.values()))
    assert counts == {(3 * 2 + 2, 3 + 1)}


@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize(
    "shares", [{}, {"teacher": 0.5}, {"student": 0.5}, {"teacher": 0.3, "student": 0.3}], ids=str
)
def test_extra_forwards_are_those_that_are_made(shares, w):
    """Counted sample by sample where the models are called, under every kind of drift."""
    for seed in range(6):
        evaluated = {"teacher": 0, "student": 0}

        def teacher(latents, tau, text, evaluated=evaluated):
            evaluated["teacher"] += len(latents)
            return latents

        def student(latents, tau, text, evaluated=evaluated):
            evaluated["student"] += len(latents)
            return latents

        objective = distillation(
            teacher, PartitionScheme(0, 4, 2, 2), w=w, drift=drifting(3, **shares)
        )
        draws = draws_for(objective, 4, seed=9 * seed)
        objective(student, batch_of(torch.randn(4, *SHAPE)), draws)
        made = evaluated["teacher"] + evaluated["student"] - 4
        assert objective.extra_forwards(draws) == made > 0


@pytest.mark.parametrize("drift", [None, DriftConfig(student=((0.0, 1.0),), chunks=2)])
def test_nothing_flows_into_the_teacher_nor_through_the_streams_that_made_the_buffers(drift):
    """The gradient is that of the last evaluation alone, from a start that is given."""
    scheme = PartitionScheme(K=0, N=4, c=2, s=2)
    factor = torch.tensor(1.2, requires_grad=True)
    slope = torch.tensor(0.1, requires_grad=True)
    seen = []

    def student(x, tau, text):
        seen.append((x, tau))
        return slope * x

    objective = distillation(
        lambda x, tau, text: factor * gaussian_teacher(x, tau, text), scheme, drift=drift
    )
    draws = draws_for(objective, 6, progress=0.5)
    loss, _ = objective(student, batch_of(torch.randn(6, *SHAPE)), draws)
    loss.backward()
    assert factor.grad is None
    start = seen[-1][0]
    assert not start.requires_grad
    assert (len(seen) > 1) == (drift is not None)
    rollout = objective.source(student, batch_of(torch.randn(6, *SHAPE)), draws)
    assert not rollout.target.requires_grad


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-9), (torch.bfloat16, 1e-4)])
def test_a_network_is_its_own_perfect_student_in_the_precision_of_the_run(dtype, bound):
    """One unguided step leaves nothing to learn but how attention rounds.

    On a CPU it has another kernel where gradients are wanted.
    """
    network = model_for().to(dtype)
    scheme = PartitionScheme(K=0, N=4, c=1, s=1)
    objective = distillation(network, scheme)
    draws = stack_draws(
        [
            objective.draw(torch.Size((4, *FAST_SHAPE)), torch.Generator().manual_seed(seed), 0.0)
            for seed in range(6)
        ]
    )
    text, latents = prompt(0, 6), torch.randn(6, 4, *FAST_SHAPE)
    batch = Batch(latents, text, prompt(1, 1), ["c"] * 6, list(range(6)))
    loss, _ = objective(network, batch, draws)
    assert loss < bound
    other = model_for(seed=4).to(dtype)
    assert objective(other, batch, draws)[0] > 0.1
