"""Partition schemes and the mixture (arXiv:2507.03745v4, Eqs. 7-9)."""

import pytest
import torch

from streamdit.config import GammaConfig, PartitionConfig, PartitionEntry
from streamdit.errors import UserError
from streamdit.partition import PartitionMixture, PartitionScheme


def mixture(*entries, frames=16, **options):
    parts = tuple(PartitionEntry(chunk_frames=c, reference_frames=k) for k, c in entries)
    return PartitionMixture(PartitionConfig(entries=parts, **options), frames)


def test_teacher_scheme_of_the_paper_has_16_frames_and_128_steps():
    scheme = PartitionScheme.for_buffer(16, chunk_frames=2, micro_steps=16)
    assert (scheme.K, scheme.N, scheme.c, scheme.s) == (0, 8, 2, 16)
    assert (scheme.buffer_frames, scheme.total_steps) == (16, 128)


def test_chunk_that_does_not_divide_the_buffer_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"chunk_frames 3 does not divide .* \[1, 2, 4, 8, 16\]"):
        PartitionScheme.for_buffer(16, chunk_frames=3)
    with pytest.raises(UserError, match="leaves no frame"):
        PartitionScheme.for_buffer(4, chunk_frames=1, reference_frames=4)


@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize("references", [0, 1, 2, 4])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_drawn_tau_falls_in_its_segment_for_every_scheme(frames, references, power):
    gamma = GammaConfig(kind="linear" if power == 1.0 else "exponential", power=power)
    rest = frames - references
    for chunk in [c for c in range(1, rest + 1) if rest % c == 0]:
        drawn = mixture((references, chunk), frames=frames, gamma=gamma)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            tau = drawn.draw(generator).tau.tolist()
            assert tau[:references] == [1.0] * references
            count = rest // chunk
            for position in range(count):  # from the head
                start = references + position * chunk
                values = set(tau[start : start + chunk])
                assert len(values) == 1, "frames of a chunk share one tau"
                segment = count - position
                low, high = (segment - 1) / count, segment / count
                assert low**power - 1e-6 <= values.pop() <= high**power + 1e-6


def test_draws_fill_their_segments_uniformly_and_independently():
    drawn = mixture((0, 2))
    generator = torch.Generator().manual_seed(0)
    taus = torch.stack([drawn.draw(generator).tau[::2] for _ in range(4000)])
    position = taus * 8 - torch.arange(7, -1, -1)
    assert position.mean(dim=0).sub(0.5).abs().max() < 0.02
    assert position.var(dim=0).sub(1 / 12).abs().max() < 0.005
    correlation = torch.corrcoef(position.T) - torch.eye(8)
    assert correlation.abs().max() < 0.06


def test_whole_buffer_chunk_is_plain_text_to_video_with_one_uniform_tau():
    drawn = mixture((0, 16))
    generator = torch.Generator().manual_seed(0)
    taus = torch.stack([drawn.draw(generator).tau for _ in range(2000)])
    assert torch.equal(taus, taus[:, :1].expand(-1, 16))
    assert abs(taus[:, 0].mean() - 0.5) < 0.02
    assert taus[:, 0].min() < 0.01
    assert taus[:, 0].max() > 0.99


def test_mixture_follows_its_weights():
    entries = (
        PartitionEntry(chunk_frames=1, weight=1.0),
        PartitionEntry(chunk_frames=16, weight=3.0),
    )
    drawn = PartitionMixture(PartitionConfig(entries=entries), 16)
    generator = torch.Generator().manual_seed(0)
    chunks = [drawn.draw(generator).scheme.c for _ in range(4000)]
    assert abs(chunks.count(16) / 4000 - 0.75) < 0.03


def test_reference_frames_carry_no_loss_and_the_rest_keeps_a_mean_of_one():
    draw = mixture((4, 3)).draw(torch.Generator().manual_seed(0))
    assert draw.weight[:4].tolist() == [0.0] * 4
    assert torch.all(draw.weight[4:] == draw.weight[4])
    assert draw.weight.mean() == pytest.approx(1.0)


def test_levels_at_the_end_of_the_micro_steps_are_the_next_chunks_levels_at_the_start():
    for gamma in (GammaConfig(), GammaConfig(kind="exponential", power=1.5)):
        scheme = PartitionScheme(K=1, N=5, c=3, s=7)
        start, end = scheme.levels(0, gamma), scheme.levels(7, gamma)
        assert torch.equal(end[1 + 3 :], start[1:-3])
        assert torch.all(end[: 1 + 3] == 1.0)
        assert torch.all(start[-3:] == 0.0)


def test_mixture_serves_its_own_partitions_at_any_number_of_micro_steps():
    drawn = mixture((0, 2), (1, 3))
    assert drawn.serves(PartitionScheme(K=0, N=8, c=2, s=16))
    assert drawn.serves(PartitionScheme(K=1, N=5, c=3, s=1))
    assert not drawn.serves(PartitionScheme(K=0, N=4, c=4, s=1))
