"""Scaled dot-product attention, by the implementation that is fastest where it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

EXPLICIT_SCORES = 1 << 27
"""Most score elements for which the explicit product is taken on a CPU (256 MB in bf16)."""


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention.

    PyTorch's fused CPU kernel is several times slower backwards than two matrix products when the
    windows are small (`benchmarks/attention_cpu.py`), so training on a CPU writes the scores out.

    Args:
        query: `[n, heads, l, d]`.
        key: `[n, heads, m, d]`.
        value: `[n, heads, m, d]`.
        mask: bool, broadcast over `[n, heads, l, m]`, true where a query may look; None: anywhere.

    Returns:
        `[n, heads, l, d]`.
    """
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    explicit = query.device.type == "cpu" and torch.is_grad_enabled() and scores <= EXPLICIT_SCORES
    if not explicit:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1) @ value
