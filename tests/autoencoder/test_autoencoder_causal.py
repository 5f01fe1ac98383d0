"""The causal autoencoder: causality, streaming decode, shapes, its linear start."""

from __future__ import annotations

import pytest
import torch

from streamdit.autoencoder.causal import (
    FACTORS,
    CausalAutoencoder,
    CausalAutoencoderConfig,
    depth_to_space,
    space_to_depth,
)
from streamdit.errors import UserError

TINY = {
    "patched": CausalAutoencoderConfig(
        latent_channels=4,
        patch=(4, 4, 4),
        widths=(8, 12),
        strides=((1, 2, 2),),
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 2),
    ),
    "staged": CausalAutoencoderConfig(
        latent_channels=4,
        patch=(1, 2, 2),
        widths=(6, 8, 12),
        strides=((2, 2, 2), (2, 2, 2)),
        encoder_blocks=(1, 1, 1),
        decoder_blocks=(1, 1, 1),
    ),
}


@pytest.fixture(params=sorted(TINY))
def autoencoder(request: pytest.FixtureRequest) -> CausalAutoencoder:
    """Random weights everywhere, also where training starts from zeros."""
    torch.manual_seed(0)
    model = CausalAutoencoder(TINY[request.param])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def video(frames: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, 16, 24, generator=generator) * 2 - 1


def latents(frames: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 4, 2, 3, generator=generator)


def test_shapes_are_a_quarter_in_time_and_an_eighth_in_space(autoencoder: CausalAutoencoder):
    encoded = autoencoder.encode(video(12, batch=2))
    assert encoded.shape == (2, 3, 4, 2, 3)
    frames, _ = autoencoder.decode(encoded)
    assert frames.shape == (2, 12, 3, 16, 24)
    assert autoencoder.frames_for(3, first=True) == autoencoder.frames_for(3, first=False) == 12


def test_latents_depend_on_their_own_and_earlier_frames_only(autoencoder: CausalAutoencoder):
    before = video(16)
    for frame in (0, 3, 4, 11, 15):
        after = before.clone()
        after[:, frame] = -after[:, frame]
        moved = (autoencoder.encode(after) - autoencoder.encode(before)).abs().amax((0, 2, 3, 4))
        assert (moved[: frame // 4] == 0).all()
        assert moved[frame // 4] > 1e-3


def test_frames_depend_on_their_own_and_earlier_latents_only(autoencoder: CausalAutoencoder):
    before = latents(4)
    for frame in range(4):
        after = before.clone()
        after[:, frame] += 1.0
        change = autoencoder.reconstruct(after) - autoencoder.reconstruct(before)
        moved = change.abs().amax((0, 2, 3, 4))
        assert (moved[: 4 * frame] == 0).all()
        assert (moved[4 * frame : 4 * frame + 4] > 1e-4).all()


def test_decoding_uses_the_past(autoencoder: CausalAutoencoder):
    """Otherwise chunk by chunk would equal whole for the wrong reason."""
    whole, _ = autoencoder.decode(latents(4))
    alone, _ = autoencoder.decode(latents(4)[:, 2:])
    assert (whole[:, 8:] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (2, 4), (1, 3, 2)])
def test_decoding_chunk_by_chunk_equals_decoding_whole(
    autoencoder: CausalAutoencoder, chunks: tuple[int, ...]
):
    whole, _ = autoencoder.decode(latents(6))
    state, parts = None, []
    for chunk in latents(6).split(chunks, dim=1):
        frames, state = autoencoder.decode(chunk, state)
        parts.append(frames)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(autoencoder.reconstruct(latents(6)), whole)


@pytest.mark.parametrize("windows", [(4, 4, 4, 4, 4, 4), (8, 16), (4, 12, 8)])
def test_encoding_window_by_window_equals_encoding_whole(
    autoencoder: CausalAutoencoder, windows: tuple[int, ...]
):
    whole = autoencoder.encode(video(24))
    state, parts = None, []
    for window in video(24).split(windows, dim=1):
        encoded, state = autoencoder.encode_next(window, state)
        parts.append(encoded)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    alone = autoencoder.encode(video(24)[:, -windows[-1] :])
    assert not torch.allclose(parts[-1], alone, rtol=1e-4, atol=1e-4), "the past is seen"


def test_interleaved_streams_decode_independently(autoencoder: CausalAutoencoder):
    whole = [autoencoder.decode(latents(4, seed))[0] for seed in (1, 2)]
    states, parts = [None, None], [[], []]
    for chunk in range(4):
        for stream, seed in enumerate((1, 2)):
            piece = latents(4, seed)[:, chunk : chunk + 1]
            frames, states[stream] = autoencoder.decode(piece, states[stream])
            parts[stream].append(frames)
    for stream in range(2):
        joined = torch.cat(parts[stream], dim=1)
        torch.testing.assert_close(joined, whole[stream], rtol=1e-5, atol=1e-5)


def test_the_state_passed_in_is_not_modified(autoencoder: CausalAutoencoder):
    _, state = autoencoder.decode(latents(2))
    copies = [tensor.clone() for tensor in state]
    first, _ = autoencoder.decode(latents(2, seed=1), state)
    again, _ = autoencoder.decode(latents(2, seed=1), state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))
    # Two frames per convolution, not whole activations kept alive by a view.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state)
    assert all(tensor.shape[2] == 2 for tensor in state)


def test_the_linear_path_starts_as_principal_component_analysis():
    """Compared with a singular value decomposition of the patches."""
    clips = video(8, batch=6)
    model = CausalAutoencoder(TINY["patched"])
    model.fit_linear_path(clips)
    encoded = model.encode(clips)
    torch.testing.assert_close(encoded.mean((0, 1, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        encoded.std((0, 1, 3, 4), unbiased=False), torch.ones(4), atol=1e-3, rtol=0
    )
    patches = space_to_depth(clips.transpose(1, 2), FACTORS).transpose(0, 1).flatten(1).T
    centred = patches - patches.mean(dim=0)
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    best = (left[:, :4] * values[:4]) @ right[:4]
    error = model.reconstruct(encoded) - clips
    torch.testing.assert_close(
        error.square().mean(), (best - centred).square().mean(), rtol=1e-4, atol=0
    )


def test_space_to_depth_gathers_patches_and_is_inverted():
    clip = torch.arange(2 * 3 * 4 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 4, 6)
    folded = space_to_depth(clip, (2, 2, 3))
    assert folded.shape == (2, 36, 2, 2, 2)
    patch = clip[1, :, 2:4, 0:2, 3:6]  # time 1, row 0, column 1
    assert torch.equal(folded[1, :, 1, 0, 1], patch.flatten())
    assert torch.equal(depth_to_space(folded, (2, 2, 3)), clip)


def test_norms_are_float32_in_bfloat16_models(autoencoder: CausalAutoencoder):
    norm = autoencoder.decoder.norm
    width = norm.weight.numel()
    x = torch.randn(1, width, 1, 2, 2).bfloat16() * 100
    reference = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()
    reference = (reference * norm.weight.double()[:, None, None, None]).to(torch.bfloat16)
    torch.testing.assert_close(norm(x), reference, rtol=1e-2, atol=1e-3)
    full, _ = autoencoder.decode(latents(2))
    half, _ = autoencoder.bfloat16().decode(latents(2))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


def test_clips_that_do_not_fit_are_refused_with_the_size_that_does(
    autoencoder: CausalAutoencoder,
):
    with pytest.raises(UserError, match=r"frames 7 is not a multiple of 4.*to 4"):
        autoencoder.encode(video(7))
    with pytest.raises(UserError, match=r"width 20 is not a multiple of 8.*to 16"):
        autoencoder.encode(torch.zeros(1, 4, 3, 16, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": (1, 4, 4)}, r"reduces by \[4, 16, 16\]"),
        ({"strides": ((2, 2, 2),)}, "strides has 1 entries but 3 widths need 2"),
        ({"decoder_blocks": (1, 1)}, "decoder_blocks has 2 entries"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CausalAutoencoderConfig(**changes)


def test_the_default_architecture_has_the_size_that_its_docstring_names():
    with torch.device("meta"):
        model = CausalAutoencoder(CausalAutoencoderConfig())
    assert 92e6 < sum(parameter.numel() for parameter in model.parameters()) < 95e6
