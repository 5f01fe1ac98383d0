"""How the loss of a frame counts by its noise level.

A buffer's levels are those of its partition and of γ, so they cannot be drawn from a density that
training prefers; weighing the loss by that density comes to the same where γ is linear. Where it is
not, what counts is the product of both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

LossWeighting = Literal["uniform", "logit-normal", "cosmap"]


def noise_weights(weighting: LossWeighting, tau: Tensor) -> Tensor:
    """Weights of frames at `tau`, in its shape and dtype; their mean over a uniform tau is 1.

    Args:
        weighting: `uniform` (arXiv:2507.03745v4, Eq. 3: all alike), or a density of
            arXiv:2403.03206, Sec. 3.1: `logit-normal` (location 0, scale 1) or `cosmap`. Both
            favour the middle; the first vanishes at either end, the second is half there.
        tau: in 0...1, 1 is clean.
    """
    if weighting == "uniform":
        return torch.ones_like(tau)
    product = tau * (1.0 - tau)
    if weighting == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * product))
    # Kept off the ends, where it is nothing to float32, but the formula is 0 by 0.
    logit = torch.logit(tau, eps=1e-6)
    return torch.exp(-0.5 * logit.square()) / (math.sqrt(2.0 * math.pi) * product.clamp(min=1e-6))
