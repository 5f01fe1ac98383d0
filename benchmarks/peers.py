"""Our transformer beside its peers, at equal dimensions, in one run: `python benchmarks/peers.py`.

Peers are diffusers' `WanTransformer3DModel` with the same weights (full attention), and window
attention written the naive way: full attention under a mask. That all compute the same is checked
before anything is timed. The variants take turns; ratios are medians over the rounds.
"""

import argparse
import math
from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from jobs.config import load_config
from jobs.measure import Timings, interleave
from streamdit.config import BucketConfig, DiTConfig
from streamdit.model import StreamDiT
from streamdit.model.block import Block, TextContext
from streamdit.model.convert import dit_config, read_wan_config, recipes
from streamdit.model.fast import FastVelocity
from streamdit.model.modulation import modulate
from streamdit.model.position import rotary_angles, rotate
from streamdit.model.windows import Windowing
from streamdit.partition import PartitionScheme
from streamdit.text.base import TextStates
from training.config import TrainConfig

TEXT = "text"
TEXT_WIDTH = 512
LIMIT = 1.05
"""Most that our block may take of the time of diffusers' block, as the median over the rounds."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative; in bfloat16 diffusers keeps some weights in float32 that ours rounds."""


def wan_model(shape: DiTConfig) -> WanTransformer3DModel:
    """Diffusers' transformer in the dimensions of `shape`, with random weights."""
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
        self.latents = torch.randn(1, bucket.frames, *self.shape, device=device)
        self.states = torch.randn(1, model.config.text_padding, TEXT_WIDTH, device=device)
        mask = torch.ones(self.states.shape[:2], dtype=torch.bool, device=device)
        self.text = TextStates({TEXT: (self.states, mask)})
        grid = model.config.token_grid(bucket)
        self.token_times = (1000 * (1 - self.levels)).repeat_interleave(grid[1] * grid[2], dim=1)


def peer_velocity(peer: WanTransformer3DModel, inputs: Inputs, times: Tensor) -> Tensor:
    """The peer's velocity in our sign and layout; `times [1]`, or one per token `[1, l]`."""
    dtype = peer.patch_embedding.weight.dtype
    video = inputs.latents.transpose(1, 2).to(dtype)
    output = peer(video, times, inputs.states.to(dtype), return_dict=False)[0]
    return -output.transpose(1, 2).float()


def naive_velocity(model: StreamDiT, latents: Tensor, tau: Tensor, text: TextStates) -> Tensor:
    """Our network with windows as a mask over full attention, everything from scratch."""
    config, grid = model.config, model.config.token_grid(model.config.buckets[0])
    context = model.project_text(text)
    time, shared = model.embed_time(tau)
    angles = rotary_angles(grid, config.width // config.heads, config.rope_theta, latents.device)
    flat = angles.flatten(0, 2)[None]
    x = model.embed_latents(latents)
    for index, block in enumerate(model.blocks):
        windowing = Windowing.of(grid, config.buckets[0].window, bool(index % 2))
        mask = window_mask(windowing, latents.device)
        x = naive_block(block, x, block.modulation(time, shared), context, flat, mask)
    return model.unembed(model.output(x, time), latents)


def window_mask(windowing: Windowing, device: torch.device) -> Tensor:
    """`[l, l]` bool: which tokens share a window."""
    tokens = math.prod(windowing.grid)
    places = torch.arange(tokens, device=device).view(1, *windowing.grid, 1)
    owner = torch.empty(tokens, dtype=torch.long, device=device)
    for number, window in enumerate(windowing.split(places)[..., 0]):
        owner[window] = number
    return owner[:, None] == owner[None, :]


def naive_block(
    block: Block,
    x: Tensor,
    signals: tuple[Tensor, ...],
    text: TextContext,
    angles: Tensor,
    mask: Tensor,
) -> Tensor:
    """A block in the order of the paper's Fig. 3, its self-attention under a mask."""
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = signals
    dtype, layer = x.dtype, block.attention
    tokens = modulate(block.attention_norm(x), shift_a, scale_a).to(dtype).flatten(1, 2)
    query, key, value = layer.qkv(tokens).chunk(3, dim=-1)
    attended = scaled_dot_product_attention(
        rotate(layer.query(query), angles.cos(), angles.sin()),
        rotate(layer.key(key), angles.cos(), angles.sin()),
        value.unflatten(-1, (layer.heads, -1)).transpose(1, 2),
        attn_mask=mask,
    )
    branch = layer.output(attended.transpose(1, 2).flatten(2)).view_as(x)
    x = (x + gate_a * branch).to(dtype)
    memory = block.text_attention.remember(text)
    x = x + block.text_attention(block.text_norm(x).to(dtype), memory)
    branch = modulate(block.ffn_norm(x), shift_f, scale_f).to(dtype)
    return (x + gate_f * block.ffn(branch)).to(dtype)


def block_actions(
    peer: WanTransformer3DModel, ours: StreamDiT, inputs: Inputs
) -> dict[str, Callable[[], Tensor]]:
    """The first block of both models, given the same tokens, time and text."""
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
        "diffusers, one time": lambda: theirs(flat, context.values, per_frame[:, 0], rotary),
        "diffusers, a time per token": lambda: theirs(flat, context.values, per_token, rotary),
        "ours": lambda: block(x, time, shared, context, windows),
        "ours, prepared": lambda: block.transform(x, signals, memory, windows),
    }


def step_actions(
    peer: WanTransformer3DModel, full: StreamDiT, windowed: StreamDiT, inputs: Inputs
) -> dict[str, Callable[[], Tensor]]:
    """Whole evaluations, of full attention and of windows."""
    tau = inputs.levels
    prepared = {}
    for name, model in (("full", full), ("windows", windowed)):
        prepared[name] = FastVelocity(model, tau, inputs.shape)
        prepared[name].set_text(inputs.text)
    return {
        "diffusers, one time": lambda: peer_velocity(peer, inputs, inputs.token_times[:, 0]),
        "diffusers, a time per token": lambda: peer_velocity(peer, inputs, inputs.token_times),
        "ours": lambda: full(inputs.latents, tau, inputs.text),
        "ours, prepared": lambda: prepared["full"](inputs.latents, 0),
        "windows as a mask": lambda: naive_velocity(windowed, inputs.latents, tau, inputs.text),
        "ours, windows": lambda: windowed(inputs.latents, tau, inputs.text),
        "ours, windows, prepared": lambda: prepared["windows"](inputs.latents, 0),
    }


def check(
    actions: dict[str, Callable[[], Tensor]], pairs: dict[str, str], dtype: torch.dtype
) -> None:
    """Assert that variants compute what others do, within rounding."""
    for name, base in pairs.items():
        expected = actions[base]().float()
        error = (
            (actions[name]().float().view_as(expected) - expected).norm() / expected.norm()
        ).item()
        assert error < TOLERANCE[dtype], f"{name} differs from {base} by {error:.1e}"


def report(title: str, timings: dict[str, Timings], base: str) -> None:
    """A table with times, and ratios to `base`."""
    print(f"\n{title}\n\n| variant | p50 ms | p95 ms | {base} ÷ it |\n|---|---|---|---|")
    for name, mine in timings.items():
        p50, p95 = mine.percentile(50), mine.percentile(95)
        print(f"| {name} | {p50:.4g} | {p95:.4g} | {timings[base].ratio_to(mine):.2f} |")


def report_pairs(blocks: dict[str, Timings], steps: dict[str, Timings]) -> None:
    """The ratios that matter, each the median over the rounds."""
    peer = "diffusers, a time per token"
    rows = (
        (f"our block ÷ {peer} (at most {LIMIT})", blocks["ours"], blocks[peer]),
        ("windows ÷ full attention", steps["ours, windows"], steps["ours"]),
        (
            "windows ÷ full attention, prepared",
            steps["ours, windows, prepared"],
            steps["ours, prepared"],
        ),
        ("windows ÷ windows as a mask", steps["ours, windows"], steps["windows as a mask"]),
    )
    print("\nMedians over the rounds\n\n| times | ratio |\n|---|---|")
    for name, mine, theirs in rows:
        print(f"| {name} | {mine.ratio_to(theirs):.2f} |")


@torch.no_grad()
def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help="training preset whose shape is taken")
    parser.add_argument("--depth", type=int, default=2, help="blocks")
    parser.add_argument("--side", type=int, help="latent rows and columns; default: the preset's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, else float32")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, name)
    shape = load_config(TrainConfig, stage="train", preset=arguments.preset).model
    bucket = shape.buckets[0]
    if arguments.side:
        bucket = bucket.model_copy(update={"height": arguments.side, "width": arguments.side})
    shape = shape.model_copy(update={"depth": arguments.depth, "buckets": (bucket,)})
    grid = shape.token_grid(bucket)
    torch.manual_seed(0)
    peer = wan_model(shape)
    full = same_model(peer, bucket.model_copy(update={"window": grid})).to(device, dtype)
    windowed = same_model(peer, bucket).to(device, dtype)
    peer = in_precision(peer.to(device), dtype)
    inputs = Inputs(full, device)
    blocks = block_actions(peer, full, inputs)
    steps = step_actions(peer, full, windowed, inputs)
    check(blocks, {"ours": "diffusers, a time per token", "ours, prepared": "ours"}, dtype)
    check(
        steps,
        {
            "ours": "diffusers, a time per token",
            "ours, prepared": "ours",
            "windows as a mask": "ours, windows",
            "ours, windows, prepared": "ours, windows",
        },
        dtype,
    )
    print(
        f"width {shape.width}, {shape.heads} heads, {arguments.depth} blocks, tokens "
        f"{'×'.join(map(str, grid))}, windows {'×'.join(map(str, bucket.window))}, {name}, "
        f"{arguments.rounds} rounds, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )
    of_blocks = interleave(blocks, device, arguments.rounds)
    report("One block, full attention", of_blocks, "diffusers, a time per token")
    of_steps = interleave(steps, device, arguments.rounds)
    report("A whole evaluation", of_steps, "diffusers, a time per token")
    report_pairs(of_blocks, of_steps)


if __name__ == "__main__":
    main()
