"""The queue's times at every step, and its latents under known velocities."""

import pytest
import torch

from streamdit.config import GammaConfig
from streamdit.denoiser import Denoiser, frame_noise
from streamdit.partition import PartitionScheme
from streamdit.text import TextStates

SHAPE = (2, 3, 3)
TEXT = TextStates({"t": (torch.zeros(1, 1, 1), torch.ones(1, 1).bool())})


def denoiser_for(scheme, model=None, seeds=(0,), **options):
    def zero(latents, tau, text):
        return torch.zeros_like(latents)

    denoiser = Denoiser(model or zero, scheme, SHAPE, list(seeds), **options)
    denoiser.set_text(TEXT.expand(len(seeds)))
    return denoiser


def eighths(*values):
    return [value / 8 for value in values]


# One row a step from the first on; written out by hand. For (K, N, c, s) = (0, 8, 2, 1) the first
# video takes 7 steps (all frames alike), then the staircase repeats at every step.
STAIRCASE_8_2 = eighths(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0)
TABLE_0_8_2_1 = [eighths(*[k] * 16) for k in range(7)] + [STAIRCASE_8_2] * 4

# (0, 4, 1, 2): eight levels, four frames; the first video takes 6 steps, then two micro steps.
TABLE_0_4_1_2 = [
    eighths(0, 0, 0, 0),
    eighths(1, 1, 1, 1),
    eighths(2, 2, 2, 2),
    eighths(3, 3, 3, 3),
    eighths(4, 4, 4, 4),
    eighths(5, 5, 5, 5),
    eighths(6, 4, 2, 0),
    eighths(7, 5, 3, 1),
    eighths(6, 4, 2, 0),
    eighths(7, 5, 3, 1),
    eighths(6, 4, 2, 0),
]

# (1, 1, 3, 8): the first video runs to the end (its first frame is the reference), then the
# three frames behind a clean one go from noise to data in eight steps.
TABLE_1_1_3_8 = (
    [eighths(k, k, k, k) for k in range(8)]
    + [eighths(8, k, k, k) for k in range(8)]
    + [eighths(8, k, k, k) for k in range(8)]
)

# (0, 8, 2, 16): 128 levels; the first video takes 7 * 16 steps, then 16 micro steps a chunk.
TABLE_0_8_2_16 = [[k / 128] * 16 for k in range(112)] + [
    [(16 * (7 - j // 2) + m) / 128 for j in range(16)] for _ in range(2) for m in range(16)
]


@pytest.mark.parametrize(
    ("scheme", "table", "emitted"),
    [
        (PartitionScheme(0, 8, 2, 1), TABLE_0_8_2_1, {7: 2, 8: 2, 9: 2, 10: 2}),
        (PartitionScheme(0, 8, 2, 16), TABLE_0_8_2_16, {127: 2, 143: 2}),
        (PartitionScheme(0, 4, 1, 2), TABLE_0_4_1_2, {7: 1, 9: 1}),
        (PartitionScheme(1, 1, 3, 8), TABLE_1_1_3_8, {7: 1, 15: 3, 23: 3}),
    ],
)
def test_times_at_every_step_equal_the_table_written_by_hand(scheme, table, emitted):
    seen = []

    def model(latents, tau, text):
        seen.append(tau[0].tolist())
        return torch.zeros_like(latents)

    denoiser = denoiser_for(scheme, model)
    out = {}
    for step, row in enumerate(table):
        assert denoiser.tau().tolist() == row
        latents = denoiser.step()
        if latents is not None:
            out[step] = latents.shape[1]
    assert seen == table
    assert out == emitted


@pytest.mark.parametrize(
    "scheme",
    [
        PartitionScheme(0, 8, 2, 1),
        PartitionScheme(0, 4, 1, 2),
        PartitionScheme(1, 1, 3, 8),
        PartitionScheme(2, 3, 2, 3),
        PartitionScheme(0, 1, 4, 4),
    ],
)
@pytest.mark.parametrize("gamma", [GammaConfig(), GammaConfig(kind="exponential", power=2.0)])
def test_a_perfect_velocity_brings_every_frame_to_its_data_once_and_in_order(scheme, gamma):
    """The model knows each frame's data by its noise: X1 = 3 + frame index, V = X1 - X0."""
    noises = {f: frame_noise(0, f, SHAPE) for f in range(60)}
    place = {"first": 0}

    def model(latents, tau, text):
        frames = range(place["first"], place["first"] + latents.shape[1])
        velocity = [torch.full(SHAPE, 3.0 + f) - noises[f] for f in frames]
        return torch.stack(velocity)[None]

    denoiser = denoiser_for(scheme, model, gamma=gamma)
    played = []
    while len(played) < 30:
        latents = denoiser.step()
        if latents is None:
            continue
        played.extend(latents[0])
        # With K references the buffer starts K frames before the next frame to be played.
        place["first"] = len(played) - scheme.K
    for index, latent in enumerate(played):
        torch.testing.assert_close(latent, torch.full(SHAPE, 3.0 + index), rtol=1e-4, atol=1e-4)


def test_first_video_leaves_every_chunk_at_its_own_noise_level():
    """Fig. 13: with velocity 1 everywhere a frame has moved by exactly its tau."""
    scheme = PartitionScheme(0, 4, 2, 3)
    denoiser = denoiser_for(scheme, lambda latents, tau, text: torch.ones_like(latents))
    while denoiser.filling:
        assert denoiser.step() is None
    for frame in range(8):
        moved = denoiser.buffer[0, frame] - frame_noise(0, frame, SHAPE)
        torch.testing.assert_close(moved, torch.full(SHAPE, float(scheme.levels(0)[frame])))


def test_one_evaluation_per_chunk_and_n_per_frame_for_a_distilled_scheme():
    evaluations = []

    def model(latents, tau, text):
        evaluations.append(latents.shape[0])
        return torch.zeros_like(latents)

    denoiser = denoiser_for(PartitionScheme(0, 8, 2, 1), model)
    for _ in range(7):
        assert denoiser.step() is None
    evaluations.clear()
    for _ in range(10):
        assert denoiser.step().shape == (1, 2, *SHAPE)
    assert evaluations == [1] * 10


def test_streams_in_step_equal_streams_alone():
    def model(latents, tau, text):
        return latents * 0.3 + tau[:, :, None, None, None]

    together = denoiser_for(PartitionScheme(1, 3, 2, 2), model, seeds=(4, 9))
    alone = [denoiser_for(PartitionScheme(1, 3, 2, 2), model, seeds=(seed,)) for seed in (4, 9)]
    for _ in range(20):
        both, each = together.step(), [denoiser.step() for denoiser in alone]
        if both is not None:
            torch.testing.assert_close(both, torch.cat(each))


def test_restored_stream_continues_bit_for_bit():
    def model(latents, tau, text):
        return latents.sin() + tau[:, :, None, None, None]

    for pause in range(1, 14):
        denoiser = denoiser_for(PartitionScheme(1, 3, 2, 2), model)
        for _ in range(pause):
            denoiser.step()
        state = denoiser.state()
        ahead = [denoiser.step() for _ in range(8)]
        other = denoiser_for(PartitionScheme(1, 3, 2, 2), model)
        other.restore(state)
        for expected in ahead:
            found = other.step()
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


def test_noise_depends_on_seed_and_frame_only():
    assert torch.equal(frame_noise(1, 5, SHAPE), frame_noise(1, 5, SHAPE))
    assert not torch.equal(frame_noise(1, 5, SHAPE), frame_noise(1, 6, SHAPE))
    assert not torch.equal(frame_noise(1, 5, SHAPE), frame_noise(2, 5, SHAPE))
    many = torch.stack([frame_noise(3, f, (4, 8, 8)) for f in range(400)])
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
