"""What all uses of `torch.compile` share."""

from __future__ import annotations

import torch

COMPILED_SHAPES = 256
"""Versions of one function that a process may compile: one per shape, layer kind and option."""


def allow_many_shapes() -> None:
    """Raise the number of versions of a function that `torch.compile` keeps, in this process.

    PyTorch's own limit of 8 is meant to catch functions that are compiled again by mistake. Code
    for fixed shapes needs a version per batch size, of which a server has many.
    """
    config = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, name, max(getattr(config, name), COMPILED_SHAPES))
