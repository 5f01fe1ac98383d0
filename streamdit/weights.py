"""Writing safetensors files one tensor at a time, for models larger than memory.

The safetensors package writes only what is in memory as a whole. Its format is a JSON header with
the place of every tensor, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the format for the precisions that weights are kept in."""

TensorKinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""


def write_safetensors(
    path: Path | str, kinds: TensorKinds, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file while holding one tensor at a time.

    Args:
        path: the file, which is replaced.
        kinds: what the file will hold; its order is that of the bytes.
        tensors: name and values in the same order, on any device.
    """
    with Path(path).open("wb") as file:
        file.write(_header(kinds))
        for (expected, kind), (name, tensor) in zip(kinds.items(), tensors, strict=True):
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, *kind), name
            flat = tensor.detach().cpu().contiguous().view(-1)
            flat.view(torch.uint8).numpy().tofile(file)


def _header(kinds: TensorKinds) -> bytes:
    """Length and JSON of the header, filled up so that tensors start at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in kinds.items():
        end = start + math.prod(shape) * dtype.itemsize
        place = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        entries[name], start = place, end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
