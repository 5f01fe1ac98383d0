"""Device memory of the transformer in bf16, in training and in streaming.

What is counted: weights, gradients, optimizer state, averaged weights, what the backward pass
keeps, what the optimizer's step takes, and the tensors of the largest block while it runs. What is
not: fragmentation, buffers of communication and of kernels, and whatever else lives on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamdit.config import BucketConfig, DiTConfig

BF16, FLOAT32 = 2, 4
ADAM_BYTES = 3 * FLOAT32
"""Master weights and two moments of AdamW, per parameter."""

STEP_BYTES = FLOAT32
"""What a step needs for a while, per parameter: DeepSpeed's float32 copy of the gradients. AdamW as
one kernel, as it is on CUDA, needs nothing more."""

SUB_GROUP = 10**9
"""Parameters that ZeRO stage 3 steps at once."""

EAGER_BYTES = 32
"""Largest live tensors of a block in eager mode without gradients, per token and feature: while
queries are rotated in float32 beside windows, queries, keys and values."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device of a data-parallel run.

    Attributes:
        weights: bf16 weights.
        gradients: bf16 gradients.
        optimizer: AdamW's float32 master weights and moments.
        ema: averaged weights in float32.
        activations: what the backward pass keeps.
        step: what the optimizer's step takes, when no activation is left.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    step: int

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        """The most at any time."""
        return self.state + max(self.activations, self.step)


def training_memory(
    parameters: int,
    stage: int,
    world_size: int,
    activations: int,
    ema: bool = True,
    offload_optimizer: bool = False,
) -> TrainingMemory:
    """Memory of one device at a ZeRO stage.

    Stage 1 shards the optimizer state over the devices, 2 also the gradients, 3 also the weights.
    The averaged weights follow the optimizer's shards at every stage, and into the host's memory.

    Args:
        parameters: of the model.
        stage: 1, 2 or 3.
        world_size: devices.
        activations: see :func:`activation_bytes`.
        ema: whether averaged weights are kept.
        offload_optimizer: whether the optimizer's state is kept, and its step made, by the host.
    """

    def shard(size: int, from_stage: int) -> int:
        return -(-size // world_size) if stage >= from_stage else size

    stepped = shard(parameters, 1)
    if stage == 3:
        stepped = min(stepped, SUB_GROUP)
    here = not offload_optimizer
    return TrainingMemory(
        weights=shard(BF16 * parameters, 3),
        gradients=shard(BF16 * parameters, 2),
        optimizer=shard(ADAM_BYTES * parameters, 1) if here else 0,
        ema=shard(FLOAT32 * parameters, 1) if here and ema else 0,
        activations=activations,
        step=STEP_BYTES * stepped if here else 0,
    )


def recomputed_blocks(setting: bool | int, depth: int) -> int:
    """Blocks, the first ones, that `activation_checkpointing` speaks of: all, none or so many."""
    return depth if setting is True else min(int(setting), depth)


def activation_bytes(
    config: DiTConfig, bucket: BucketConfig, text_tokens: int, batch: int, recomputed: int = 0
) -> int:
    """What the backward pass keeps of `batch` samples, at its most.

    Of the first `recomputed` blocks that is their input, and all of one while it is recomputed. By
    then what was kept of the blocks behind them is free again.
    """
    per_block = batch * block_activation_bytes(config, bucket, text_tokens)
    block_input = batch * _tokens(config, bucket) * config.width * BF16
    return recomputed * block_input + max(config.depth - recomputed, 1) * per_block


def fewest_recomputed(
    config: DiTConfig, bucket: BucketConfig, text_tokens: int, batch: int, room: float
) -> int | None:
    """Fewest blocks to recompute for `batch` samples to keep at most `room` bytes; None: no way."""
    sizes = (
        activation_bytes(config, bucket, text_tokens, batch, blocks)
        for blocks in range(config.depth + 1)
    )
    return next((blocks for blocks, size in enumerate(sizes) if size <= room), None)


def block_activation_bytes(config: DiTConfig, bucket: BucketConfig, text_tokens: int) -> int:
    """What autograd keeps of one block and sample, with fused attention.

    Per token and feature, in float32: the inputs of the three layer norms and the outputs of the
    two that are modulated; queries and keys of the windows and queries to the text, where they are
    normalised. In bf16: the windows, the matrix of queries, keys and values, rotated queries and
    keys, the attention's output and that of its projection; the text attention's input, queries and
    output; the feed-forward network's input, output, and its hidden features before and after GELU.
    """
    normalised = 3 if config.qk_norm != "none" else 0
    features = FLOAT32 * (5 + normalised) * config.width
    features += BF16 * (13 * config.width + 2 * config.ffn_width)
    # Keys are kept as float32 before their norm and bf16 after it, beside the matrix of both.
    text = (3 * BF16 + (FLOAT32 if normalised else 0)) * config.width
    return _tokens(config, bucket) * features + text_tokens * text


def streaming_bytes(
    config: DiTConfig, bucket: BucketConfig, text_tokens: int, batch: int
) -> tuple[int, int]:
    """Memory of a stream beside the weights.

    Returns:
        Keys and values of the text in all blocks; and the tensors of a block while it runs, in
        eager mode (compiled, it needs less).
    """
    memory = batch * config.depth * text_tokens * 2 * config.width * BF16
    return memory, batch * _tokens(config, bucket) * config.width * EAGER_BYTES


def _tokens(config: DiTConfig, bucket: BucketConfig) -> int:
    frames, rows, columns = config.token_grid(bucket)
    return frames * rows * columns
