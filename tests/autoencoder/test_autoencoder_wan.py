"""diffusers' Wan VAE behind the contract, compared with diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from streamdit.autoencoder import load_autoencoder
from streamdit.autoencoder.wan import WanAutoencoder
from streamdit.errors import UserError

CONFIGS = {
    "wan2.1": {
        "z_dim": 4,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [2.0, 1.0, 4, 0.5],
    },
    "wan2.2": {
        "z_dim": 4,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
        "decoder_base_dim": 12,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1, **CONFIGS[request.param]
    )
    path = tmp_path_factory.mktemp(request.param)
    vae.save_pretrained(path)
    return path


@pytest.fixture
def wan(directory: Path) -> WanAutoencoder:
    loaded = load_autoencoder(directory)
    assert isinstance(loaded, WanAutoencoder)
    return loaded


def clip(wan: WanAutoencoder, frames: int) -> torch.Tensor:
    side = 2 * wan.identity.spatial_factor
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(1, frames, 3, side, side, generator=generator) * 2 - 1


def latents(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, frames, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def reference_decode(wan: WanAutoencoder, z: torch.Tensor) -> torch.Tensor:
    return wan.vae.decode(z.transpose(1, 2)).sample.transpose(1, 2)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encoding_equals_diffusers(wan: WanAutoencoder, frames: int):
    video = clip(wan, frames)
    expected = wan.vae.encode(video.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    encoded = wan.encode(video)
    assert encoded.shape == (1, 1 + frames // 4, 4, 2, 2)
    torch.testing.assert_close(encoded, expected)


@pytest.mark.parametrize("windows", [(1, 4, 4, 4), (5, 8), (9, 4)])
def test_encoding_window_by_window_equals_encoding_whole(
    wan: WanAutoencoder, windows: tuple[int, ...]
):
    state, parts = None, []
    for window in clip(wan, 13).split(windows, dim=1):
        encoded, state = wan.encode_next(window, state)
        parts.append(encoded)
    torch.testing.assert_close(torch.cat(parts, dim=1), wan.encode(clip(wan, 13)))
    with pytest.raises(UserError, match="4k behind the first; cut the clip to 4"):
        wan.encode_next(clip(wan, 5), state)


@pytest.mark.parametrize("chunks", [(5,), (1, 1, 1, 1, 1), (2, 3), (3, 1, 1)])
def test_decoding_chunk_by_chunk_equals_diffusers_whole(
    wan: WanAutoencoder, chunks: tuple[int, ...]
):
    expected = reference_decode(wan, latents(5))
    state, parts = None, []
    for chunk in latents(5).split(chunks, dim=1):
        expected_frames = wan.frames_for(chunk.shape[1], first=state is None)
        frames, state = wan.decode(chunk, state)
        assert frames.shape[1] == expected_frames
        parts.append(frames)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_interleaved_streams_decode_independently(wan: WanAutoencoder):
    states, parts = [None, None], [[], []]
    for chunk in range(4):
        for stream in range(2):
            piece = latents(4, seed=stream)[:, chunk : chunk + 1]
            frames, states[stream] = wan.decode(piece, states[stream])
            parts[stream].append(frames)
    for stream in range(2):
        expected = reference_decode(wan, latents(4, seed=stream))
        torch.testing.assert_close(torch.cat(parts[stream], dim=1), expected)


def test_the_state_passed_in_can_be_replayed(wan: WanAutoencoder):
    _, state = wan.decode(latents(2))
    first, _ = wan.decode(latents(2, seed=1), state)
    again, _ = wan.decode(latents(2, seed=1), state)
    assert torch.equal(first, again)


def test_the_identity_comes_from_the_configuration(wan: WanAutoencoder, directory: Path):
    identity = wan.identity
    assert identity.kind == "wan"
    assert identity.first_frame_alone
    assert identity.spatial_factor == (16 if wan.patch == 2 else 8)
    assert identity.source == str(directory)
    assert load_autoencoder(directory).identity == identity
    raw = torch.randn(1, 2, 4, 2, 2)
    mean = torch.tensor(wan.vae.config.latents_mean).view(4, 1, 1)
    deviation = torch.tensor(wan.vae.config.latents_std).view(4, 1, 1)
    torch.testing.assert_close(wan.normalise(raw), (raw - mean) / deviation)


def test_the_hash_tells_other_weights_apart(wan: WanAutoencoder, tmp_path: Path):
    with torch.no_grad():
        wan.vae.quant_conv.bias += 1e-3
    wan.vae.save_pretrained(tmp_path)
    assert load_autoencoder(tmp_path).identity.sha256 != wan.identity.sha256


def test_a_pipeline_directory_loads_its_vae(wan: WanAutoencoder, tmp_path: Path):
    wan.vae.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(tmp_path)
    assert loaded.identity.sha256 == wan.identity.sha256
    # Not the pipeline, whose transformer and text encoder no model directory shall carry along.
    assert loaded.identity.source == str(tmp_path / "vae")


def test_clips_that_do_not_fit_are_refused(wan: WanAutoencoder):
    with pytest.raises(UserError, match=r"frames 8 .* 1 \+ 4k; cut the clip to 5"):
        wan.encode(clip(wan, 8))
    with pytest.raises(UserError, match="is not a multiple of"):
        wan.encode(clip(wan, 5)[..., :-4])


def test_another_class_of_autoencoder_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLCogVideoX"}))
    with pytest.raises(UserError, match="is of class AutoencoderKLCogVideoX"):
        load_autoencoder(tmp_path)


def test_a_vae_with_other_temporal_factor_is_refused():
    vae = AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        z_dim=16,
        temperal_downsample=[False, False, True],
    )
    with pytest.raises(UserError, match="temperal_downsample"):
        WanAutoencoder(vae, "somewhere", "0")
