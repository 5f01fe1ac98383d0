"""A small network, its schedule and prompts, for tests of the streaming step."""

import torch

from streamdit.config import DiTConfig
from streamdit.model import StreamDiT
from streamdit.partition import PartitionScheme
from streamdit.text import TextStates

TOLERANCE = 1e-5
"""Relative error in float32: the same sums, some of them in another order."""

SHAPE = (3, 8, 12)

LENGTHS = {"long": 7, "short": 2}

CAPACITY = 12


def model_for(modulation="zero", seed=3, width=SHAPE[2]) -> StreamDiT:
    config = DiTConfig.model_validate(
        {
            "latent_channels": SHAPE[0],
            "buckets": [{"frames": 4, "height": 8, "width": width, "window": [2, 2, 3]}],
            "width": 32,
            "depth": 3,
            "heads": 2,
            "ffn_width": 48,
            "modulation": modulation,
            "text": {"long": 5, "short": 6},
            "time_frequencies": 16,
        }
    )
    model = StreamDiT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def prompt(seed, batch=1, lengths=LENGTHS, padded=False):
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for (name, length), width in zip(lengths.items(), (5, 6), strict=True):
        mask = torch.ones(batch, length, dtype=torch.bool)
        if padded:
            mask[0, -1] = False
        states[name] = (torch.randn(batch, length, width, generator=generator), mask)
    return TextStates(states)


def schedule() -> torch.Tensor:
    """Levels of a uniform filling and of a staircase with two micro steps, `[rows, 4]`."""
    uniform = PartitionScheme(K=0, N=1, c=4, s=4)
    staircase = PartitionScheme(K=0, N=2, c=2, s=2)
    rows = [uniform.levels(m) for m in range(4)] + [staircase.levels(m) for m in range(2)]
    return torch.stack(rows)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
