"""3D rotary positions: a frame's place in the buffer and a patch's place in the picture."""

from __future__ import annotations

import torch
from torch import Tensor

from streamdit.model.modulation import precise

Triple = tuple[int, int, int]


def axis_widths(head_width: int) -> Triple:
    """Features of a head given to (frames, rows, columns): two even thirds, the rest to time."""
    spatial = 2 * (head_width // 6)
    return (head_width - 2 * spatial, spatial, spatial)


def sinusoidal_positions(grid: Triple, width: int, device: torch.device) -> Tensor:
    """Fixed embedding of every token's place, `[F, H * W, width]` float32 with entries in -1...1.

    Each axis has a share of the features (as :func:`axis_widths`): sines and cosines of its index
    at geometrically spaced rates from 1.5 down to a tenth of that, which tell neighbours apart on
    grids of a few to a few dozen tokens.
    """
    axes = []
    for axis, (size, share) in enumerate(zip(grid, axis_widths(width), strict=True)):
        rates = 1.5 * 10.0 ** -(torch.arange(share // 2, device=device) / (share // 2))
        angles = torch.arange(size, device=device)[:, None] * rates
        shape = [1, 1, 1, share]
        shape[axis] = size
        table = torch.cat([angles.sin(), angles.cos()], dim=-1).view(shape)
        axes.append(table.expand(*grid, share))
    return torch.cat(axes, dim=-1).flatten(1, 2)


def rotary_angles(grid: Triple, head_width: int, theta: float, device: torch.device) -> Tensor:
    """Rotation angle of every feature pair at every token, `[F, H, W, head_width / 2]` float32."""
    axes = []
    for axis, (size, width) in enumerate(zip(grid, axis_widths(head_width), strict=True)):
        exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
        angles = torch.arange(size, device=device, dtype=torch.float32)[:, None] / theta**exponents
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        axes.append(angles.view(shape).expand(*grid, width // 2))
    return torch.cat(axes, dim=-1)


def rotate(features: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring feature pairs.

    Args:
        features: `[n, heads, l, head_width]`; n is a multiple of the number of windows.
        cos: cosines of the angles `[windows, l, head_width / 2]`, in the same window order.
        sin: their sines.

    Returns:
        Same shape and dtype as `features`; the rotation itself is done in float32.
    """
    # Token by token, as features come out of a linear layer: what attention makes of them then
    # lies so too, and goes into the next one without a copy.
    tokens = precise(features).transpose(1, 2)
    even, odd = tokens.unflatten(0, (-1, cos.shape[0])).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[None, :, :, None], sin[None, :, :, None]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).flatten(0, 1).transpose(1, 2).to(features.dtype)
