"""A peer of our transformer at equal dimensions and weights: diffusers' `WanTransformer3DModel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamdit.config import BucketConfig, DiTConfig
from streamdit.model import StreamDiT
from streamdit.model.convert import dit_config, read_wan_config, recipes
from streamdit.partition import PartitionScheme
from streamdit.text.base import TextStates

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

TEXT = "text"
TEXT_WIDTH = 512

PEER_BLOCK = "diffusers' Wan block"
OUR_BLOCK = "our block, as Wan's"
PAIR = (PEER_BLOCK, OUR_BLOCK)
"""Names of one block of either, in full attention and with a time per token, as a stream needs."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative; in bfloat16 diffusers keeps some weights in float32 that ours rounds."""


def wan_model(shape: DiTConfig) -> WanTransformer3DModel:
    """Diffusers' transformer in the dimensions of `shape`, with random weights."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=shape.patch,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        text_dim=TEXT_WIDTH,
        freq_dim=shape.time_frequencies,
        ffn_dim=shape.ffn_width,
        num_layers=shape.depth,
    ).eval()


def same_model(peer: WanTransformer3DModel, bucket: BucketConfig) -> StreamDiT:
    """Our transformer with the peer's weights, and the windows of `bucket`."""
    wan = read_wan_config({**peer.config, "_class_name": "WanTransformer3DModel"}, "peer")
    model = StreamDiT(dit_config(wan, bucket, TEXT)).eval()
    theirs = peer.state_dict()
    model.load_state_dict(
        {
            name: recipe.combine([theirs[part] for part in recipe.sources])
            for name, recipe in recipes(wan, TEXT).items()
        }
    )
    return model


def in_precision(peer: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """The peer in `dtype`, with the parts in float32 that diffusers keeps there."""
    for name, parameter in peer.named_parameters():
        if not any(part in name for part in peer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return peer


class Inputs:
    """Latents, a staircase of times and text for both models."""

    def __init__(self, model: StreamDiT, device: torch.device) -> None:
        bucket = model.config.buckets[0]
        self.shape = (model.config.latent_channels, bucket.height, bucket.width)
        self.levels = PartitionScheme(0, bucket.frames, 1, 1).levels(0)[None].to(device)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.latents = random(1, bucket.frames, *self.shape)
        self.states = random(1, model.config.text_padding, TEXT_WIDTH)
        mask = torch.ones(self.states.shape[:2], dtype=torch.bool, device=device)
        self.text = TextStates({TEXT: (self.states, mask)})
        grid = model.config.token_grid(bucket)
        self.token_times = (1000 * (1 - self.levels)).repeat_interleave(grid[1] * grid[2], dim=1)


def block_actions(
    peer: WanTransformer3DModel, ours: StreamDiT, inputs: Inputs
) -> dict[str, Callable[[], Tensor]]:
    """The first block of both models, given the same tokens, time and text.

    Diffusers' with a time per token, and with one time for all; ours as it trains, and with
    modulation and text prepared.
    """
    x = ours.embed_latents(inputs.latents)
    context = ours.project_text(inputs.text)
    time, shared = ours.embed_time(inputs.levels)
    windows = ours.window_contexts(inputs.latents.shape, x.device)[0]
    block, theirs = ours.blocks[0], peer.blocks[0]
    rotary = peer.rope(inputs.latents.transpose(1, 2))
    per_frame = shared.unflatten(-1, (6, -1))
    per_token = per_frame.repeat_interleave(x.shape[2], dim=1)
    signals, memory = block.modulation(time, shared), block.text_attention.remember(context)
    flat = x.flatten(1, 2)
    return {
        PEER_BLOCK: lambda: theirs(flat, context.values, per_token, rotary),
        f"{PEER_BLOCK}, one time": lambda: theirs(flat, context.values, per_frame[:, 0], rotary),
        OUR_BLOCK: lambda: block(x, time, shared, context, windows),
        f"{OUR_BLOCK}, prepared": lambda: block.transform(x, signals, memory, windows),
    }


def check_equal(
    actions: dict[str, Callable[[], Tensor]], pairs: dict[str, str], dtype: torch.dtype
) -> None:
    """Assert that variants compute what others do, within rounding."""
    for name, base in pairs.items():
        expected = actions[base]().float()
        error = (actions[name]().float().view_as(expected) - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], f"{name} differs from {base} by {error:.1e}"


@torch.no_grad()
def paired_blocks(
    shape: DiTConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """A block of diffusers' and one of ours in the dimensions of `shape`, in full attention.

    They have the same weights; that they compute the same is checked.
    """
    bucket = shape.buckets[0]
    whole = bucket.model_copy(update={"window": shape.token_grid(bucket)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peer = wan_model(shape.model_copy(update={"depth": 1}))
    ours = same_model(peer, whole).to(device, dtype)
    actions = block_actions(in_precision(peer.to(device), dtype), ours, Inputs(ours, device))
    check_equal(actions, {OUR_BLOCK: PEER_BLOCK}, dtype)
    return {name: torch.no_grad()(actions[name]) for name in PAIR}
