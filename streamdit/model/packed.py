"""Text attention over real tokens alone, for GPUs.

Video tokens look at every token of their prompt and at no padding. Under a mask the fastest kernels
do not serve, and the others compute padding too. So the prompts lie one behind the other without
gaps, and the kernel reads from the device where each ends: compiled code and captured CUDA graphs
hold for prompts of any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamdit.model.block import TextMemory

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None  # type: ignore[assignment]

CAPABILITY = (8, 0)
"""First CUDA compute capability with FlashAttention."""

LARGEST_HEAD = 256
"""Widest head that FlashAttention takes."""


def can_pack(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether attention over packed text runs here."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and dtype in (torch.float16, torch.bfloat16)
        and head_width % 8 == 0
        and head_width <= LARGEST_HEAD
    )


@dataclass(frozen=True)
class PackedTextMemory(TextMemory):
    """Real tokens of all prompts, one prompt behind the other.

    Attributes:
        key: `[tokens, heads, d / heads]`; what lies behind the last prompt is not looked at.
        value: same shape.
        mask: None.
        ends: `[b + 1]` int32, where each prompt starts and the next one does.
        longest: bound on the tokens of a prompt.
    """

    ends: Tensor
    longest: int

    def attend(self, query: Tensor) -> Tensor:
        """Attention of `query [b, heads, l, d / heads]` to its own prompt."""
        batch, _, tokens, _ = query.shape
        starts = torch.arange(
            0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device
        )
        rows = query.transpose(1, 2).flatten(0, 1)
        attended = varlen_attn(rows, self.key, self.value, starts, self.ends, tokens, self.longest)
        assert isinstance(attended, Tensor)
        return attended.unflatten(0, (batch, tokens)).transpose(1, 2)


class PackedText:
    """Packed keys and values of all blocks, in buffers that every prompt overwrites.

    Args:
        room: `[depth, b, heads, l, d / heads]` keys, whose shape but for l and whose type and
            device the buffers have.
        capacity: tokens of a prompt that there is room for.
    """

    def __init__(self, room: Tensor, capacity: int) -> None:
        depth, batch, heads, _, width = room.shape
        self._capacity = capacity
        # The last place takes what is not real.
        shape = (depth, batch * capacity + 1, heads, width)
        self._key, self._value = room.new_zeros(shape), room.new_zeros(shape)
        self._ends = torch.zeros(batch + 1, dtype=torch.int32, device=room.device)

    def set(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Overwrite them by `key` and `value [depth, b, heads, l, d / heads]`.

        The host learns nothing of `mask [b, 1, 1, l]`, so it need not wait for the device.
        """
        batch, tokens = key.shape[1], key.shape[3]
        if mask is None:
            mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=key.device)
        real = mask.expand(batch, 1, 1, tokens).reshape(batch, tokens)
        places = real.flatten().cumsum(0) - 1
        places = torch.where(real.flatten(), places, self._key.shape[1] - 1)
        for buffer, states in ((self._key, key), (self._value, value)):
            buffer.index_copy_(1, places, states.transpose(2, 3).flatten(1, 2))
        self._ends[1:] = real.sum(dim=1).cumsum(0)

    def of_block(self, index: int) -> PackedTextMemory:
        """The memory of block `index`."""
        key, value = self._key[index], self._value[index]
        return PackedTextMemory(key, value, None, self._ends, self._capacity)
