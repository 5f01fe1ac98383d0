"""Text conditioning: the states of all encoders as one sequence of the model's width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamdit.config import DiTConfig
from streamdit.text.base import TextStates, pad_states, real_tokens


@dataclass(frozen=True)
class TextContext:
    """Projected text: `values [b, l, d]`, and `mask [b, 1, 1, l]` bool, None if all are real."""

    values: Tensor
    mask: Tensor | None


class TextProjector(nn.Sequential):
    """One text encoder's states to the width of the model."""

    def __init__(self, text_width: int, config: DiTConfig) -> None:
        super().__init__(
            nn.LayerNorm(text_width) if config.text_norm else nn.Identity(),
            nn.Linear(text_width, config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.width, config.width),
        )

    def forward(self, states: Tensor) -> Tensor:
        """`[b, l, text width]` of any floating dtype to `[b, l, d]` in the weights' dtype."""
        return super().forward(states.to(self[1].weight.dtype))  # type: ignore[arg-type]


class MaskedPadding(nn.Module):
    """Padding stays what it is and is hidden by its mask."""

    def forward(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Values `[b, l, d]` and mask `[b, l]`, as they are."""
        return values, mask


class ZeroPadding(nn.Module):
    """Padding is zeros up to a fixed length, and part of the text."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Values `[b, l, d]` to `[b, tokens, d]`, without a mask.

        Raises:
            ValueError: if there are more than `tokens` states.
        """
        if values.shape[1] > self.tokens:
            raise ValueError(
                f"text of {values.shape[1]} tokens is longer than the {self.tokens} that this "
                "model takes (model.text_padding); encode it with fewer max_tokens"
            )
        if mask is not None:
            values = values.masked_fill(~mask[:, :, None], 0.0)
        return pad_states(values, None, self.tokens)[0], None


class TextProjection(nn.Module):
    """All encoders' states, each through its own projector, one after the other."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.padding: nn.Module = (
            MaskedPadding() if config.text_padding is None else ZeroPadding(config.text_padding)
        )
        self.projectors = nn.ModuleDict(
            {name: TextProjector(width, config) for name, width in config.text.items()}
        )

    def forward(self, text: TextStates) -> TextContext:
        """Project and concatenate; there is a mask only if some encoder's states have one."""
        values, masks = [], []
        for name, projector in self.projectors.items():
            states, mask = self.padding(*text[name])
            values.append(projector(states))
            masks.append(mask)
        if all(mask is None for mask in masks):
            return TextContext(torch.cat(values, dim=1), None)
        mask = torch.cat([real_tokens(*part) for part in zip(values, masks, strict=True)], dim=1)
        return TextContext(torch.cat(values, dim=1), mask[:, None, None, :])
