"""Time conditioning: one embedding per latent frame, turned into scale, shift and gate.

Everything here is computed in float32, whatever the precision of the rest of the model; only a
model in float64, against which others are checked, stays in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from streamdit.config import DiTConfig


def precise(x: Tensor) -> Tensor:
    """Float32, or float64 where `x` is."""
    return x if x.dtype == torch.float64 else x.float()


class _WidenedLinear(torch.autograd.Function):
    """`x W^T + b` in float32, of which only the narrow W is kept for the way back.

    Autograd would keep the widened copy: over all blocks of the 4B model 4.4 GB that nothing but
    the gradient of `x` needs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`x [..., in]` float32, `weight [out, in]` and `bias [out]` narrower."""
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight.float(), bias.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients, those of weight and bias rounded to their precision as autograd would."""
        x, weight = ctx.saved_tensors
        wanted, rows = ctx.needs_input_grad, grad.flatten(0, -2)
        return (
            grad @ weight.float() if wanted[0] else None,
            (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if wanted[1] else None,
            rows.sum(0).to(weight.dtype) if wanted[2] else None,
        )


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32 even where its weights are kept in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]` float32."""
        weight = self.weight
        # The meta device, on which shapes are traced, has no autocast of its own.
        with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
            if weight.dtype in (torch.float32, torch.float64):
                return nn.functional.linear(x.to(weight.dtype), weight, self.bias)
            widened: Tensor = _WidenedLinear.apply(x.float(), weight, self.bias)
            return widened


class TimeEmbedding(nn.Module):
    """Sinusoidal features of time through a two-layer network, one vector per frame."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.frequencies = config.time_frequencies
        # Tau or 1 - tau is stretched to 0...1000, the range that the frequencies below resolve.
        self.at_noise, self.slope = {"tau": (0.0, 1000.0), "noise": (1000.0, -1000.0)}[
            config.time_axis
        ]
        self.input = Float32Linear(config.time_frequencies, config.width)
        self.output = Float32Linear(config.width, config.width)

    def forward(self, tau: Tensor) -> Tensor:
        """`tau [b, f]` in 0...1 to `[b, f, width]` float32."""
        half = self.frequencies // 2
        steps = torch.arange(half, device=tau.device, dtype=torch.float32)
        rates = torch.exp(-math.log(10_000.0) * steps / half)
        angles = (self.at_noise + self.slope * precise(tau)[..., None]) * rates
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.output(nn.functional.silu(self.input(features)))


class ZeroModulation(nn.Module):
    """adaLN-zero: the block's own projection of the time embedding, zero at the start."""

    def __init__(self, width: int, signals: int) -> None:
        super().__init__()
        self.signals = signals
        self.projection = Float32Linear(width, signals * width)

    def initialise(self, generator: torch.Generator | None) -> None:
        """Zero, so that every block starts as the identity."""
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, time: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        """`time [b, f, d]` to `signals` tensors `[b, f, 1, d]` float32."""
        signals: Tensor = self.projection(nn.functional.silu(time))
        return signals.unsqueeze(2).chunk(self.signals, dim=-1)


class SingleModulation(nn.Module):
    """adaLN-single: a projection shared by all blocks plus this block's learned table."""

    def __init__(self, width: int, signals: int) -> None:
        super().__init__()
        self.signals = signals
        self.table = nn.Parameter(torch.empty(signals, width))

    def initialise(self, generator: torch.Generator | None) -> None:
        """Small random entries, as PixArt-alpha uses."""
        nn.init.normal_(self.table, std=self.table.shape[1] ** -0.5, generator=generator)

    def forward(self, time: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        """`shared [b, f, signals * d]` plus the table, to `signals` tensors `[b, f, 1, d]`."""
        assert shared is not None, "adaLN-single needs the shared projection"
        return self.add_table(precise(shared).unflatten(-1, (self.signals, -1)))

    def add_table(self, signals: Tensor) -> tuple[Tensor, ...]:
        """`[b, f, signals or 1, d]` plus the table, as `signals` tensors `[b, f, 1, d]`."""
        return (signals + precise(self.table)).unsqueeze(3).unbind(dim=2)


class TimeTableModulation(SingleModulation):
    """adaLN-single of the output: the time embedding itself plus a learned table."""

    def forward(self, time: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        """`time [b, f, d]` plus the table, to `signals` tensors `[b, f, 1, d]`."""
        return self.add_table(time.unsqueeze(2))


def build_modulation(config: DiTConfig, signals: int) -> ZeroModulation | SingleModulation:
    """The blocks' modulation that the configuration names."""
    if config.modulation == "zero":
        return ZeroModulation(config.width, signals)
    return SingleModulation(config.width, signals)


def build_output_modulation(config: DiTConfig, signals: int) -> ZeroModulation | SingleModulation:
    """The output layer's modulation that the configuration names."""
    if config.modulation == "zero":
        return ZeroModulation(config.width, signals)
    return TimeTableModulation(config.width, signals)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`normed [b, f, n, d]` times `1 + scale` plus `shift`, both `[b, f, 1, d]`, in float32."""
    return precise(normed) * (1.0 + scale) + shift


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm in float32; the output is float32 and the caller casts it."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]` float32."""
        weight = None if self.weight is None else precise(self.weight)
        bias = None if self.bias is None else precise(self.bias)
        return nn.functional.layer_norm(precise(x), self.normalized_shape, weight, bias, self.eps)


class Float32RMSNorm(nn.RMSNorm):
    """Root-mean-square norm in float32, cast back to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`."""
        normed = nn.functional.rms_norm(
            precise(x), list(self.normalized_shape), precise(self.weight), self.eps
        )
        return normed.to(x.dtype)
