"""Floating-point operations of one forward pass, by part (a multiply-add counts as two)."""

from __future__ import annotations

from streamdit.config import BucketConfig, DiTConfig


def count_flops(
    config: DiTConfig, bucket: BucketConfig | None = None, text_tokens: int = 64
) -> dict[str, int]:
    """Operations of one sample's forward pass.

    Matrix products and attention are counted; norms, activations and rotary positions, which move
    bytes rather than multiply, are not.

    Args:
        config: shape of the network.
        bucket: latent grid; default: the first.
        text_tokens: text tokens of all encoders together.

    Returns:
        Operations by part, and `total`.
    """
    bucket = bucket or config.buckets[0]
    frames, rows, columns = config.token_grid(bucket)
    tokens = frames * rows * columns
    window = bucket.window[0] * bucket.window[1] * bucket.window[2]
    width, depth = config.width, config.depth
    voxels = config.patch[0] * config.patch[1] * config.patch[2] * config.latent_channels
    block_modulation = 2 * frames * width * 6 * width
    parts = {
        "patch_embedding": 2 * tokens * voxels * width,
        "time_embedding": 2 * frames * (config.time_frequencies + width) * width,
        "text_projection": sum(
            2 * text_tokens * (text_width + width) * width for text_width in config.text.values()
        ),
        "modulation": block_modulation * (depth if config.modulation == "zero" else 1),
        "attention_projections": depth * 2 * tokens * width * 4 * width,
        # Scores and weighted values: each token meets the tokens of its window.
        "window_attention": depth * 4 * tokens * window * width,
        "text_attention_projections": depth
        * (2 * tokens * width * 2 * width + 2 * text_tokens * width * 2 * width),
        "text_attention": depth * 4 * tokens * text_tokens * width,
        "feed_forward": depth * 4 * tokens * width * config.ffn_width,
        "output": 2 * frames * width * 2 * width + 2 * tokens * width * voxels,
    }
    return parts | {"total": sum(parts.values())}
