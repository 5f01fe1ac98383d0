"""Autoencoders whose first latent encodes a single frame."""

import numpy as np
import pytest
import torch
from conftest import write_shots

from pipeline.clips import read_clip
from pipeline.config import ClipConfig
from pipeline.latents import encode_frames, latent_shape
from streamdit.autoencoder import load_autoencoder


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    folder = tmp_path_factory.mktemp("wan")
    vae.save_pretrained(folder)
    return load_autoencoder(str(folder))


def test_stored_latents_all_stand_for_four_frames(tiny_wan, tmp_path):
    clip = ClipConfig(frames=16, fps=16.0, height=32, width=32)
    assert latent_shape(tiny_wan, clip) == (4, 4, 4, 4)
    path = write_shots(tmp_path / "v.mp4", ["red"], seconds=2.0)
    frames = read_clip(str(path), 0.0, 17, 16.0, 32, 32)
    stored = encode_frames(tiny_wan, frames[None], torch.float32)
    assert stored.shape == (1, 4, 4, 4, 4)
    unit = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    assert torch.allclose(stored, tiny_wan.encode(unit)[:, 1:], atol=1e-6)
    changed = frames.copy()
    changed[13:] = np.flip(changed[13:], axis=2)
    differs = (encode_frames(tiny_wan, changed[None], torch.float32) != stored).flatten(2).any(2)[0]
    assert differs.tolist() == [False, False, False, True]
