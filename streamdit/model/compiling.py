"""What all uses of `torch.compile` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

COMPILED_SHAPES = 256
"""Versions of one function that a process may compile: one per shape, layer kind and option."""


def compile_for_fixed_shapes(
    function: Callable[..., Result], **options: Any
) -> Callable[..., Result]:
    """`function` compiled, with a version for each shape that it is called with.

    Args:
        function: what to compile.
        options: of `torch.compile`, whose `dynamic` is off.
    """
    compiled = torch.compile(function, dynamic=False, **options)

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        # At every call, for a thread may have settings of torch.compile of its own.
        _allow_many_shapes()
        return compiled(*arguments)

    return call


def compile_for_any_shape(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` compiled for the sizes of its first call.

    An axis that changes later, such as the tokens of texts, is compiled once more, for any size.
    """
    compiled = torch.compile(function, dynamic=None, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        _allow_many_shapes()
        return compiled(*arguments)

    return call


def _allow_many_shapes() -> None:
    """Raise the number of versions of a function that `torch.compile` keeps.

    PyTorch's own limit of 8 is meant to catch functions that are compiled again by mistake. Code
    for fixed shapes needs a version per batch size, of which a server has many.
    """
    config = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(config, name) < COMPILED_SHAPES:
            setattr(config, name, COMPILED_SHAPES)
