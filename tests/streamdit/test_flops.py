"""The operation count against PyTorch's own counter, which watches the real forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamdit.config import DiTConfig
from streamdit.model import StreamDiT
from streamdit.model.flops import PER_PROMPT, PER_SCHEDULE, count_flops
from streamdit.text import TextStates

TOKENS = {"t": 5, "u": 7}


def config(**changes):
    values = {
        "latent_channels": 3,
        "buckets": [{"frames": 6, "height": 8, "width": 12, "window": [3, 2, 3]}],
        "width": 32,
        "depth": 3,
        "heads": 2,
        "ffn_width": 48,
        "text": {"t": 5, "u": 9},
        "time_frequencies": 16,
    }
    return DiTConfig.model_validate(values | changes)


def counted(shape: DiTConfig) -> int:
    model = StreamDiT(shape)
    bucket = shape.buckets[0]
    states = {
        name: (torch.randn(1, length, shape.text[name]), None) for name, length in TOKENS.items()
    }
    latents = torch.randn(1, bucket.frames, shape.latent_channels, bucket.height, bucket.width)
    # With gradients, since PyTorch does not count what its fused CPU attention does.
    with FlopCounterMode(display=False) as counter:
        model(latents, torch.rand(1, bucket.frames), TextStates(states))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modulation": "single"},
        {"temporal_wrap": False},
        {"temporal_wrap": False, "depth": 4},
        {"text_padding": 11, "text_norm": False, "qk_norm": "across_heads"},
        {"buckets": [{"frames": 6, "height": 8, "width": 12, "window": [6, 4, 6]}]},
    ],
)
def test_count_equals_that_of_pytorch(changes):
    shape = config(**changes)
    parts = count_flops(shape, text_tokens=TOKENS)
    assert parts["total"] == sum(parts.values()) - parts["total"]
    assert parts["total"] == counted(shape)


def test_windows_cut_the_cost_of_attention_by_their_share_of_the_grid():
    whole = config(buckets=[{"frames": 6, "height": 8, "width": 12, "window": [6, 4, 6]}])
    cut, full = (count_flops(shape)["window_attention"] for shape in (config(), whole))
    assert full * (3 * 2 * 3) == cut * (6 * 4 * 6)


def test_parts_that_need_no_repetition_are_named():
    parts = count_flops(config())
    assert {*PER_PROMPT, *PER_SCHEDULE} < parts.keys()
