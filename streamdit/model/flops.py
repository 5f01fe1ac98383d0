"""Floating-point operations of one forward pass, by part (a multiply-add counts as two)."""

from __future__ import annotations

from collections.abc import Mapping

from streamdit.config import BucketConfig, DiTConfig
from streamdit.model.windows import Windowing

PER_PROMPT = ("text_projection", "text_keys_values")
"""Parts that stay the same for as long as a prompt does."""

PER_SCHEDULE = ("time_embedding", "modulation")
"""Parts that depend on tau alone: once a stream runs, tau comes round with every chunk."""


IN_BLOCKS = (
    *("attention_projections", "window_attention", "feed_forward"),
    *("text_queries_outputs", "text_keys_values", "text_attention"),
)
"""Parts that lie in the blocks alone; with adaLN-zero most of the modulation does too."""


def count_flops(
    config: DiTConfig,
    bucket: BucketConfig | None = None,
    text_tokens: int | Mapping[str, int] = 64,
) -> dict[str, int]:
    """Operations of one sample's forward pass.

    Matrix products and attention are counted; norms, activations and rotary positions, which move
    bytes rather than multiply, are not.

    Args:
        config: shape of the network.
        bucket: latent grid; default: the first.
        text_tokens: tokens of each text encoder, by its name or the same for all; a model that
            fills text up (`text_padding`) always has that many.

    Returns:
        Operations by part, and `total`.
    """
    bucket = bucket or config.buckets[0]
    grid = config.token_grid(bucket)
    tokens = grid[0] * grid[1] * grid[2]
    frames, width, depth = grid[0], config.width, config.depth
    voxels = config.patch[0] * config.patch[1] * config.patch[2] * config.latent_channels
    lengths = text_lengths(config, text_tokens)
    text = sum(lengths.values())
    projection = sum(2 * lengths[name] * (d + width) * width for name, d in config.text.items())
    signal = 2 * frames * width * width
    # adaLN-zero projects 6 signals in every block and 2 in the output, adaLN-single 6 in all.
    signals = 6 * depth + 2 if config.modulation == "zero" else 6
    parts = {
        "patch_embedding": 2 * tokens * voxels * width,
        "time_embedding": 2 * frames * (config.time_frequencies + width) * width,
        "text_projection": projection,
        "modulation": signals * signal,
        "attention_projections": depth * 2 * tokens * width * 4 * width,
        # Scores and weighted values: each token meets the tokens of its window.
        "window_attention": 4 * width * attention_pairs(config, bucket),
        "text_queries_outputs": depth * 2 * tokens * width * 2 * width,
        "text_keys_values": depth * 2 * text * width * 2 * width,
        "text_attention": depth * 4 * tokens * text * width,
        "feed_forward": depth * 4 * tokens * width * config.ffn_width,
        "output": 2 * tokens * width * voxels,
    }
    return parts | {"total": sum(parts.values())}


def recomputed_flops(config: DiTConfig, parts: Mapping[str, int], blocks: int) -> int:
    """Operations of running `blocks` blocks once more, of a forward pass with these `parts`."""
    in_blocks = sum(parts[name] for name in IN_BLOCKS)
    if config.modulation == "zero":
        in_blocks += parts["modulation"] * 6 * config.depth // (6 * config.depth + 2)
    return in_blocks * blocks // config.depth


def text_lengths(config: DiTConfig, text_tokens: int | Mapping[str, int]) -> dict[str, int]:
    """Text tokens that the model attends to, by encoder."""
    if config.text_padding is not None:
        return dict.fromkeys(config.text, config.text_padding)
    if isinstance(text_tokens, int):
        return dict.fromkeys(config.text, text_tokens)
    return {name: text_tokens[name] for name in config.text}


def attention_pairs(config: DiTConfig, bucket: BucketConfig) -> int:
    """Pairs of tokens that attend to each other, over all layers."""
    grid = config.token_grid(bucket)
    regular, shifted = (
        Windowing.of(grid, bucket.window, shift, config.temporal_wrap).pairs
        for shift in (False, True)
    )
    return (config.depth + 1) // 2 * regular + config.depth // 2 * shifted
