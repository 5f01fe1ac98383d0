"""The table of published models against the models themselves, built from their published shape."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from streamdit.published import TEXT_ENCODERS, WAN_AUTOENCODERS, text_encoder_parameters

T5_SHAPES = {
    "ul2": (
        T5Config,
        T5EncoderModel,
        {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 256,
            "d_ff": 16384,
            "num_layers": 32,
            "num_heads": 16,
            "feed_forward_proj": "gated-silu",
        },
    ),
    "byt5": (
        T5Config,
        T5EncoderModel,
        {
            "vocab_size": 384,
            "d_model": 1472,
            "d_kv": 64,
            "d_ff": 3584,
            "num_layers": 12,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "umt5": (
        UMT5Config,
        UMT5EncoderModel,
        {
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", sorted(T5_SHAPES))
def test_t5_encoders_have_the_size_of_the_table(name):
    config_class, model_class, shape = T5_SHAPES[name]
    with torch.device("meta"):
        model = model_class(config_class(**shape))
    assert TEXT_ENCODERS[name].parameters == size(model)
    assert TEXT_ENCODERS[name].config.width == shape["d_model"]


def test_metaclip_text_tower_has_the_size_of_the_table():
    import open_clip
    from open_clip.model import CLIP

    encoder = TEXT_ENCODERS["metaclip"]
    shape = open_clip.get_model_config(encoder.config.source)
    assert (encoder.config.source, encoder.config.pretrained) in open_clip.list_pretrained()
    with torch.device("meta"):
        model = CLIP(**shape)
    text = (model.transformer, model.token_embedding, model.ln_final)
    assert encoder.parameters == sum(map(size, text)) + model.positional_embedding.numel()
    assert encoder.config.width == shape["text_cfg"]["width"]
    assert encoder.config.max_tokens == shape["text_cfg"]["context_length"]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
    ],
)
def test_wan_autoencoders_have_the_size_of_the_table(shape):
    with torch.device("meta"):
        vae = AutoencoderKLWan(**shape)
    assert WAN_AUTOENCODERS[vae.config.z_dim] == size(vae)


def test_unknown_encoders_have_no_size():
    assert text_encoder_parameters("bytes", 256) == 0
    assert text_encoder_parameters("ul2", 4096) == TEXT_ENCODERS["ul2"].parameters
    assert text_encoder_parameters("ul2", 512) is None
    assert text_encoder_parameters("mine", 512) is None
