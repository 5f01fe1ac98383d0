"""Memory by formula against what autograd and the allocator really keep."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from streamdit.config import DiTConfig
from streamdit.model import StreamDiT
from streamdit.model import attention as attention_module
from streamdit.model.memory import (
    activation_bytes,
    block_activation_bytes,
    fewest_recomputed,
    recomputed_blocks,
    streaming_bytes,
    training_memory,
)
from streamdit.text import TextStates

TEXT_TOKENS = 20


def config(**changes):
    values = {
        "latent_channels": 4,
        "buckets": [{"frames": 4, "height": 16, "width": 16, "window": [2, 4, 4]}],
        "width": 128,
        "depth": 3,
        "heads": 4,
        "ffn_width": 512,
        "text": {"t": 8},
    }
    return DiTConfig.model_validate(values | changes)


@pytest.fixture(autouse=True)
def _fused_attention(monkeypatch):
    """As on a GPU: scores are never written out."""
    monkeypatch.setattr(attention_module, "EXPLICIT_SCORES", 0)


def arguments(shape: DiTConfig):
    bucket = shape.buckets[0]
    latents = torch.randn(1, bucket.frames, shape.latent_channels, bucket.height, bucket.width)
    text = TextStates({"t": (torch.randn(1, TEXT_TOKENS, 8), None)})
    return latents, torch.rand(1, bucket.frames), text


def kept_bytes(model: StreamDiT) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*arguments(model.config))
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


@pytest.mark.parametrize("modulation", ["zero", "single"])
@pytest.mark.parametrize("qk_norm", ["per_head", "across_heads", "none"])
def test_a_block_keeps_what_the_formula_says(qk_norm, modulation):
    shape = config(qk_norm=qk_norm, modulation=modulation)
    deep = StreamDiT(shape).bfloat16()
    shallow = StreamDiT(shape.model_copy(update={"depth": 1})).bfloat16()
    measured = (kept_bytes(deep) - kept_bytes(shallow)) / 2
    expected = block_activation_bytes(shape, shape.buckets[0], TEXT_TOKENS)
    if qk_norm != "none":
        # On a CPU PyTorch's norm of queries and keys keeps its float32 output too.
        expected += 4 * (3 * 4 * 8 * 8 + TEXT_TOKENS) * 128
    assert measured == pytest.approx(expected, rel=0.03)


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors that were made inside, and the most there were."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._known.discard(key)
        self.live -= size


def test_a_running_block_needs_what_the_formula_says():
    # A large grid, beside which the modulation's signals are small.
    grid = {"frames": 4, "height": 32, "width": 32, "window": [2, 4, 4]}
    shape = config(depth=1, buckets=[grid])
    model = StreamDiT(shape).bfloat16()
    given = arguments(shape)
    with torch.no_grad(), LiveBytes() as mode:
        model(*given)
    _, expected = streaming_bytes(shape, shape.buckets[0], TEXT_TOKENS, batch=1)
    assert mode.peak == pytest.approx(expected, rel=0.05)


def test_checkpointing_keeps_inputs_and_one_block():
    shape = config()
    bucket = shape.buckets[0]
    tokens, block = 4 * 8 * 8, block_activation_bytes(shape, bucket, TEXT_TOKENS)
    sizes = [activation_bytes(shape, bucket, TEXT_TOKENS, 2, blocks) for blocks in range(4)]
    block_input = tokens * 128 * 2
    assert sizes == [
        2 * 3 * block,
        2 * (block_input + 2 * block),
        2 * (2 * block_input + block),
        2 * (3 * block_input + block),
    ]
    assert [
        fewest_recomputed(shape, bucket, TEXT_TOKENS, 2, room)
        for room in (sizes[0], sizes[0] - 1, sizes[2], sizes[2] - 1)
    ] == [0, 1, 2, None]


def test_a_setting_names_all_blocks_none_or_the_first_ones():
    assert [recomputed_blocks(setting, 6) for setting in (True, False, 0, 4, 9)] == [6, 0, 0, 4, 6]


def test_each_stage_shards_one_thing_more():
    """The published accounting of ZeRO: 2 + 2 + 12 bytes per parameter, and 4 for the average."""
    stages = [training_memory(1000, stage, world_size=8, activations=7) for stage in (1, 2, 3)]
    assert [memory.state for memory in stages] == [
        2000 + 2000 + 16000 // 8,
        2000 + 18000 // 8,
        20000 // 8,
    ]
    assert training_memory(1000, 1, 1, 0, ema=False).state == 16000


def test_the_optimizers_step_takes_the_place_of_activations():
    """4 bytes per parameter that a device steps: the gradients in float32."""
    small, large = (training_memory(1000, 1, 8, activations) for activations in (7, 7000))
    assert small.step == large.step == 4 * 1000 // 8
    assert small.total == small.state + 500
    assert large.total == large.state + 7000
    # Stage 3 goes by groups of a billion parameters.
    assert training_memory(4 * 10**9, 3, 1, 0).step == 4 * 10**9
    assert training_memory(4 * 10**9, 2, 1, 0).step == 16 * 10**9


def test_what_is_offloaded_is_in_the_hosts_memory():
    memory = training_memory(1000, 2, 1, activations=7, offload_optimizer=True)
    assert (memory.optimizer, memory.ema, memory.step) == (0, 0, 0)
    assert memory.total == 2000 + 2000 + 7
