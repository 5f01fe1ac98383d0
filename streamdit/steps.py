"""Who computes the velocity of a stream's steps: the network as it is, or prepared for them.

A stream knows the times of all its steps before the first one, so a step is named by its row of
the schedule, and whatever depends on the row or the prompt alone can be kept.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from streamdit.flow import VelocityFunction, guided_velocity
from streamdit.text.base import TextStates


class StepVelocity(Protocol):
    """Velocity of the buffers of b streams at the rows of their schedule."""

    def set_text(self, text: TextStates, null_text: TextStates | None) -> None:
        """Prompts of the b streams from the next step on, and the empty prompt for guidance."""

    def __call__(self, latents: Tensor, row: int) -> Tensor:
        """Velocity `[b, B, C, h, w]` of `latents`, which stand at row `row`.

        The result may be overwritten by the next call.
        """


class PlainVelocity:
    """The network, evaluated from scratch at every step.

    Args:
        model: velocity function, as :class:`streamdit.model.StreamDiT`.
        levels: times `[rows, B]` that steps start from.
        guidance_scale: classifier-free guidance weight w.
    """

    def __init__(self, model: VelocityFunction, levels: Tensor, guidance_scale: float) -> None:
        self._model = model
        self._levels = levels
        self._guidance_scale = guidance_scale
        self._text: TextStates | None = None
        self._null_text: TextStates | None = None

    def set_text(self, text: TextStates, null_text: TextStates | None) -> None:
        """Keep the states; they are projected at every step."""
        self._text, self._null_text = text, null_text

    def __call__(self, latents: Tensor, row: int) -> Tensor:
        """Velocity under guidance; see :func:`streamdit.flow.guided_velocity`."""
        assert self._text is not None, "set_text comes before the first step"
        tau = self._levels[row].expand(len(latents), -1)
        return guided_velocity(
            self._model, latents, tau, self._text, self._null_text, self._guidance_scale
        )
