"""What the network computes from time and text alone, computed once and kept.

A stream visits the same few times over and over, and its prompt changes seldom. So every scale,
shift and gate comes from a table, and every key and value of the text from buffers that a new
prompt overwrites in place: compiled code and captured CUDA graphs that read them stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from streamdit.errors import UserError
from streamdit.model.block import Block, TextContext, TextMemory
from streamdit.model.dit import StreamDiT
from streamdit.model.packed import PackedText, can_pack

ALIGNMENT = 64
"""Padded text is a multiple of this many tokens long, which attention kernels ask of masks."""


def blocks_of(model: StreamDiT) -> list[Block]:
    """The blocks of a model, typed as such."""
    return cast("list[Block]", list(model.blocks))


def signals_at(model: StreamDiT, times: Tensor) -> tuple[Tensor, Tensor]:
    """Scale, shift and gate at `times [n]`, float32.

    Returns:
        `[n, depth, 6, d]` of all blocks and `[n, 2, d]` of the output layer.
    """
    time, shared = model.embed_time(times[None])
    blocks = [torch.cat(block.modulation(time, shared), dim=2)[0] for block in blocks_of(model)]
    return torch.stack(blocks, dim=1), torch.cat(model.output.modulation(time, None), dim=2)[0]


class Signals:
    """Scale, shift and gate of every frame in the step at hand.

    Attributes:
        blocks: `[f, depth, 6, d]` float32, of every block.
        output: `[f, 2, d]` float32, of the output layer.
    """

    def __init__(self, model: StreamDiT, levels: Tensor, tabulate: bool = True) -> None:
        """Prepare for the steps of a schedule, whose times are `levels [rows, f]`.

        With `tabulate` a row is kept per distinct time, which filling and staircase share; else
        every step computes its own.
        """
        self._model = model
        self._levels = levels
        self._row: int | None = None
        self.blocks, self.output = signals_at(model, levels[0])
        self._table: tuple[Tensor, Tensor] | None = None
        if tabulate:
            times, self._index = torch.unique(levels, return_inverse=True)
            self._table = signals_at(model, times)

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return sum(table.nbytes for table in self._table or ())

    def select(self, row: int) -> None:
        """Fill the buffers for the step that starts from row `row` of the levels."""
        if self._table is None:
            blocks, output = signals_at(self._model, self._levels[row])
            self.blocks.copy_(blocks)
            self.output.copy_(output)
        elif row != self._row:
            blocks, output = self._table
            torch.index_select(blocks, 0, self._index[row], out=self.blocks)
            torch.index_select(output, 0, self._index[row], out=self.output)
        self._row = row


@dataclass(frozen=True)
class PaddedText:
    """Keys and values of all blocks, `[depth, b, heads, l, d / heads]`, and the mask of padding."""

    key: Tensor
    value: Tensor
    mask: Tensor | None

    @classmethod
    def buffers(cls, room: Tensor, capacity: int) -> PaddedText:
        """Buffers that every prompt overwrites; shaped like the keys `room` but for l."""
        capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        shape = (*room.shape[:3], capacity, room.shape[4])
        mask = torch.zeros(room.shape[1], 1, 1, capacity, dtype=torch.bool, device=room.device)
        return cls(room.new_zeros(shape), room.new_zeros(shape), mask)

    def set(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Overwrite the buffers."""
        assert self.mask is not None
        tokens = key.shape[3]
        self.key[..., :tokens, :] = key
        self.value[..., :tokens, :] = value
        self.mask[..., :tokens] = True if mask is None else mask
        self.mask[..., tokens:] = False

    def of_block(self, index: int) -> TextMemory:
        """The memory of block `index`."""
        return TextMemory(self.key[index], self.value[index], self.mask)


class TextMemories:
    """Keys and values of the prompts in force, for every block's text attention.

    Padding is left out where the device can do without (:mod:`streamdit.model.packed`), and masked
    elsewhere.

    Args:
        model: whose text attention it is.
        capacity: tokens of a prompt that there is room for, for code that needs the buffers to
            stay in place. None: as many as the prompt has.
        packed: whether to leave padding out, where that can be done; else it is masked.
    """

    def __init__(self, model: StreamDiT, capacity: int | None = None, packed: bool = True) -> None:
        self._model = model
        self._capacity = capacity
        self._packed = packed
        self._text: PaddedText | PackedText | None = None

    def set(self, text: TextContext) -> None:
        """Overwrite the buffers by the memories of `text`.

        Raises:
            UserError: if the prompt has more tokens than there is room for.
        """
        memories = [block.text_attention.remember(text) for block in blocks_of(self._model)]
        key = torch.stack([memory.key for memory in memories])
        value = torch.stack([memory.value for memory in memories])
        tokens = key.shape[3]
        packs = self._packed and can_pack(key.device, key.dtype, key.shape[4])
        if self._capacity is None:
            if text.mask is None or not packs:
                self._text = PaddedText(key, value, text.mask)
                return
            self._text = PackedText(key, tokens)
        elif tokens > self._capacity:
            raise UserError(
                f"the prompt has {tokens} text tokens but the stream keeps room for "
                f"{self._capacity}; shorten it, or raise text_tokens in the stream's FastConfig"
            )
        elif self._text is None:
            buffers = PackedText if packs else PaddedText.buffers
            self._text = buffers(key, self._capacity)
        self._text.set(key, value, text.mask)

    def of_block(self, index: int) -> TextMemory:
        """The memory of block `index`."""
        assert self._text is not None, "set comes before the first step"
        return self._text.of_block(index)
