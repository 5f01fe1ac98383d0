"""Linear layers in 8-bit floating point (e4m3), for GPUs that multiply it twice as fast as bf16."""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from streamdit.model.dit import StreamDiT

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max

ERROR_BOUND = 0.08
"""Most by which a velocity may differ, relative to its norm. Three bits of mantissa are 4 % of a
number; products average over many, and layers add up."""

TOKEN_LAYERS = (
    "attention.qkv",
    "attention.output",
    "text_attention.to_query",
    "text_attention.output",
    "ffn.0",
    "ffn.2",
)
"""Linear layers of a block that see every video token: nearly all the work of a step."""


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row to the range of e4m3 and round.

    Args:
        rows: `[n, k]` floating.

    Returns:
        Rounded rows `[n, k]` e4m3, and `scale [n, 1]` float32 with `rows ~ rounded * scale`.
    """
    rows = rows.float()
    # A row of zeros keeps a scale that can be divided by.
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (rows / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer whose weights, and inputs as they come, are rounded to e4m3 row by row.

    Every output channel and every token has a scale of its own. GPUs add up with fast accumulation,
    which keeps fewer bits than float32 and is part of the stated error. Inside a compiled block the
    rounding of the input is fused into what produces it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise_rows(linear.weight.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., k]` to `[..., out]` in the dtype of `x`."""
        rows, scale = quantise_rows(x.flatten(0, -2))
        output = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return output.unflatten(0, x.shape[:-1])


_ROUNDED: WeakKeyDictionary[StreamDiT, StreamDiT] = WeakKeyDictionary()


def with_float8_linears(model: StreamDiT) -> StreamDiT:
    """A model that shares all weights with `model`, except that its blocks multiply in e4m3.

    Layers that see time, text or latents, where rounding costs most and work is least, stay as
    they are. Made once and kept with `model`, whose weights must not change any more.
    """
    if model not in _ROUNDED:
        _ROUNDED[model] = _with_float8_linears(model)
    return _ROUNDED[model]


def _with_float8_linears(model: StreamDiT) -> StreamDiT:
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for block in model.blocks:
        for name in TOKEN_LAYERS:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
            block.set_submodule(name, Float8Linear(linear))
    return model
