"""Small Wan pipelines with random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

TRANSFORMER = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 3,
}
VAE = {
    "base_dim": 8,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "z_dim": 4,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [2.0, 1.0, 4.0, 0.5],
}
VAE_TI2V = {
    **VAE,
    "decoder_base_dim": 12,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
TEXT = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def random_transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    """A transformer whose every weight, norms and tables too, is random."""
    model = WanTransformer3DModel(**{**TRANSFORMER, **changes}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def write_pipeline(
    folder: Path, vae: dict | None = None, max_shard_size: str = "10GB", **changes
) -> Path:
    """A whole text-to-video pipeline."""
    torch.manual_seed(0)
    pieces = ["<pad>", "</s>", "<unk>", *("▁abcdefghijklmnopqrstuvwxyz")]
    pipeline = WanPipeline(
        tokenizer=T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces]),
        text_encoder=UMT5EncoderModel(UMT5Config(**TEXT)).eval(),
        vae=AutoencoderKLWan(**(vae or VAE)),
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True),
        transformer=random_transformer(),
        **changes,
    )
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
