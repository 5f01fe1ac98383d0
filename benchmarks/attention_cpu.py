"""Fused against written-out attention on one CPU thread: `python benchmarks/attention_cpu.py`.

Forward and backward of the demo model's two kinds of attention in bf16, both ways in turn, as the
median of paired ratios.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from streamdit.model.attention import attention

CASES = {
    "window attention, 64 windows of 64 tokens": ((64, 4, 64, 32), (64, 4, 64, 32), False),
    "text attention, 8 x 128 tokens to 11": ((8, 4, 128, 32), (8, 4, 11, 32), True),
}
PAIRS = 20


def seconds(function: Callable[..., Tensor], tensors: list[Tensor], mask: Tensor | None) -> float:
    """Time of one forward and backward pass."""
    started = time.perf_counter()
    function(*tensors, mask).sum().backward()
    return time.perf_counter() - started


def main() -> None:
    """Print a line per case."""
    torch.set_num_threads(1)
    for name, (queries, keys, masked) in CASES.items():
        tensors = [
            torch.randn(shape).bfloat16().requires_grad_() for shape in (queries, keys, keys)
        ]
        mask = torch.ones(queries[0], 1, 1, keys[2], dtype=torch.bool) if masked else None

        def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        pairs = [
            (seconds(fused, tensors, mask), seconds(attention, tensors, mask))
            for _ in range(PAIRS + 2)
        ][2:]
        ratio = statistics.median(a / b for a, b in pairs)
        milliseconds = [1e3 * statistics.median(times) for times in zip(*pairs, strict=True)]
        print(
            f"{name}: fused {milliseconds[0]:.1f} ms, written out {milliseconds[1]:.1f} ms, "
            f"fused / written out {ratio:.1f}"
        )


if __name__ == "__main__":
    main()
