"""Our transformer beside its peers, at equal dimensions, in one run: `python benchmarks/peers.py`.

Peers are diffusers' `WanTransformer3DModel` with the same weights (full attention), and window
attention written the naive way: full attention under a mask. That all compute the same is checked
before anything is timed. The variants take turns; ratios are medians over the rounds.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from jobs.bench_peer import (
    OUR_BLOCK,
    PEER_BLOCK,
    Inputs,
    block_actions,
    check_equal,
    in_precision,
    same_model,
    wan_model,
)
from jobs.config import load_config
from jobs.measure import Timings, interleave
from streamdit.model import StreamDiT
from streamdit.model.block import Block, TextContext
from streamdit.model.fast import FastVelocity
from streamdit.model.modulation import modulate
from streamdit.model.position import rotary_angles, rotate
from streamdit.model.windows import Windowing
from streamdit.text.base import TextStates
from training.config import TrainConfig

LIMIT = 1.05
"""Most that our block may take of the time of diffusers' block, as the median over the rounds."""

PEER = "diffusers, a time per token"
OURS = "ours"


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
        PEER: lambda: peer_velocity(peer, inputs, inputs.token_times),
        OURS: lambda: full(inputs.latents, tau, inputs.text),
        "ours, prepared": lambda: prepared["full"](inputs.latents, 0),
        "windows as a mask": lambda: naive_velocity(windowed, inputs.latents, tau, inputs.text),
        "ours, windows": lambda: windowed(inputs.latents, tau, inputs.text),
        "ours, windows, prepared": lambda: prepared["windows"](inputs.latents, 0),
    }


def report(title: str, timings: dict[str, Timings], base: str) -> None:
    """A table with times, and ratios to `base`."""
    print(f"\n{title}\n\n| variant | p50 ms | p95 ms | {base} ÷ it |\n|---|---|---|---|")
    for name, mine in timings.items():
        p50, p95 = mine.percentile(50), mine.percentile(95)
        print(f"| {name} | {p50:.4g} | {p95:.4g} | {timings[base].ratio_to(mine):.2f} |")


def ratios_of(blocks: dict[str, Timings], steps: dict[str, Timings]) -> dict[str, float]:
    """The ratios that matter, each the median over the rounds."""
    pairs = {
        f"our block ÷ diffusers', a time per token (at most {LIMIT})": (
            blocks[OUR_BLOCK],
            blocks[PEER_BLOCK],
        ),
        "windows ÷ full attention": (steps["ours, windows"], steps[OURS]),
        "windows ÷ full attention, prepared": (
            steps["ours, windows, prepared"],
            steps["ours, prepared"],
        ),
        "windows ÷ windows as a mask": (steps["ours, windows"], steps["windows as a mask"]),
    }
    return {name: mine.ratio_to(theirs) for name, (mine, theirs) in pairs.items()}


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every time as JSON")
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
    check_equal(blocks, {OUR_BLOCK: PEER_BLOCK, f"{OUR_BLOCK}, prepared": OUR_BLOCK}, dtype)
    check_equal(
        steps,
        {
            OURS: PEER,
            "ours, prepared": OURS,
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
    report("One block, full attention", of_blocks, PEER_BLOCK)
    of_steps = interleave(steps, device, arguments.rounds)
    report("A whole evaluation", of_steps, PEER)
    ratios = ratios_of(of_blocks, of_steps)
    print("\nMedians over the rounds\n\n| times | ratio |\n|---|---|")
    for times, ratio in ratios.items():
        print(f"| {times} | {ratio:.2f} |")
    if arguments.json is not None:
        milliseconds = {
            what: {variant: found.milliseconds for variant, found in timings.items()}
            for what, timings in (("block", of_blocks), ("evaluation", of_steps))
        }
        figures = {"preset": arguments.preset, "dtype": name, "torch": torch.__version__}
        figures |= {"device": device.type, "ratios": ratios, "milliseconds": milliseconds}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
