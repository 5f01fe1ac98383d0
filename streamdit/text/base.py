"""The contract of text conditioning: states by encoder name, and who makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from streamdit.config import TextEncoderConfig

MaskedStates = tuple[Tensor, Tensor | None]
"""Values `[b, l, d]` floating, and mask `[b, l]` bool: true where a token is real, None if all are.
"""


class TextStates(Mapping[str, MaskedStates]):
    """Text states of a batch of prompts, by encoder name.

    Encoders may have different lengths and widths, but share the batch. A batch without padding has
    no mask, since attention runs faster without one.
    """

    def __init__(self, states: Mapping[str, MaskedStates]) -> None:
        for name, (values, mask) in states.items():
            assert mask is None or values.shape[:-1] == mask.shape, (
                f"{name}: values {tuple(values.shape)} and mask {tuple(mask.shape)} disagree"
            )
        assert len({values.shape[0] for values, _ in states.values()}) <= 1
        self._states = dict(states)

    def __getitem__(self, name: str) -> MaskedStates:
        return self._states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return next(iter(self._states.values()))[0].shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextStates:
        """Copy to `device`, values also to `dtype`; masks stay boolean."""
        return TextStates(
            {
                name: (
                    values.to(device=device, dtype=dtype),
                    None if mask is None else mask.to(device=device),
                )
                for name, (values, mask) in self._states.items()
            }
        )

    def select(self, rows: Sequence[int]) -> TextStates:
        """States of the prompts `rows`, in that order (repeats allowed)."""
        index = list(rows)
        return TextStates(
            {
                name: (values[index], None if mask is None else mask[index])
                for name, (values, mask) in self._states.items()
            }
        )

    def expand(self, batch: int) -> TextStates:
        """Repeat the states of one prompt `batch` times."""
        assert self.batch == 1
        states: dict[str, MaskedStates] = {}
        for name, (values, mask) in self._states.items():
            masks = None if mask is None else mask.expand(batch, -1)
            states[name] = (values.expand(batch, -1, -1), masks)
        return TextStates(states)

    def where(self, keep: Tensor, other: TextStates) -> TextStates:
        """Rows of self where `keep [b]` is true, of `other` elsewhere (caption dropout).

        `other` has as many rows, or one for all.
        """
        states: dict[str, MaskedStates] = {}
        for name, (values, mask) in self._states.items():
            # No row is looked up by its number: that would make the host wait for `keep`.
            length = max(values.shape[1], other[name][0].shape[1])
            mine, theirs = pad_states(values, mask, length), pad_states(*other[name], length)
            chosen = torch.where(keep[:, None, None], mine[0], theirs[0])
            if mine[1] is None and theirs[1] is None:
                states[name] = (chosen, None)
            else:
                real = torch.where(keep[:, None], real_tokens(*mine), real_tokens(*theirs))
                states[name] = (chosen, real)
        return TextStates(states)

    @staticmethod
    def concatenate(parts: Sequence[TextStates]) -> TextStates:
        """Stack batches; shorter sequences are padded with masked zeros."""
        states: dict[str, MaskedStates] = {}
        for name in parts[0]:
            length = max(part[name][0].shape[1] for part in parts)
            padded = [pad_states(*part[name], length) for part in parts]
            values = torch.cat([values for values, _ in padded])
            if all(mask is None for _, mask in padded):
                states[name] = (values, None)
            else:
                masks = [real_tokens(part, mask) for part, mask in padded]
                states[name] = (values, torch.cat(masks))
        return TextStates(states)

    @staticmethod
    def collate(samples: Sequence[Mapping[str, Tensor]]) -> TextStates:
        """Batch unpadded states: each sample maps encoder name to values `[l, d]`."""
        return TextStates.concatenate(
            [
                TextStates({name: (values.unsqueeze(0), None) for name, values in sample.items()})
                for sample in samples
            ]
        )

    def unpadded(self) -> list[dict[str, Tensor]]:
        """The inverse of :meth:`collate`: per prompt, encoder name to values `[l, d]`."""
        return [
            {
                name: values[row] if mask is None else values[row][mask[row]]
                for name, (values, mask) in self._states.items()
            }
            for row in range(self.batch)
        ]


def real_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mask `[b, l]` of `values [b, l, d]`, written out where there is none."""
    if mask is not None:
        return mask
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)


def pad_states(values: Tensor, mask: Tensor | None, length: int) -> MaskedStates:
    """Pad `values [b, l, d]` and `mask [b, l]` at the end to `length` tokens."""
    missing = length - values.shape[1]
    if missing == 0:
        return values, mask
    return (
        torch.nn.functional.pad(values, (0, 0, 0, missing)),
        torch.nn.functional.pad(real_tokens(values, mask), (0, missing)),
    )


class TextEncoder(Protocol):
    """Anything that turns prompts into states."""

    config: TextEncoderConfig

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode `prompts`.

        Returns:
            Values `[b, l, width]` in float32 and mask `[b, l]` bool. Every prompt, the empty one
            included, has at least one real token. A prompt's real states do not depend on the
            other prompts of the batch.
        """
        ...


class TextEncoders:
    """All encoders of a model, run together."""

    def __init__(self, encoders: Iterable[TextEncoder]) -> None:
        self.encoders = tuple(encoders)

    @property
    def configs(self) -> tuple[TextEncoderConfig, ...]:
        """Configuration of each encoder, in order."""
        return tuple(encoder.config for encoder in self.encoders)

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States of `prompts` from every encoder, padded no further than the longest needs."""
        states = TextStates(
            {encoder.config.name: encoder.encode(prompts) for encoder in self.encoders}
        )
        return TextStates.collate(states.unpadded())
