"""The times of a stream: which frame of the buffer stands where at every step.

A stream first fills its buffer, then repeats the s micro steps of its scheme for ever. All of it
is known before the first step, as whole numbers of denoising steps taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamdit.config import GammaConfig, StartKind
from streamdit.partition import PartitionScheme, step_levels


class StreamSchedule:
    """Positions and times of the buffer's frames at every step of a stream.

    Three ways lead to the staircase:

    - `text-to-video` (arXiv:2507.03745v4, Fig. 13): all frames walk together, and each chunk is
      put aside where it reaches its own noise level. With K > 0 and no references given, the walk
      goes to its end, for the references to be clean.
    - `ramp`: each chunk waits in noise until its turn and then walks, so that all arrive at their
      own level at the same time.
    - given references (K > 0) stay clean; the frames behind them walk together.

    Args:
        scheme: partition of the buffer.
        gamma: noise schedule.
        start: `text-to-video` or `ramp`.
        references_given: whether the K references are there from the first step on.
    """

    def __init__(
        self,
        scheme: PartitionScheme,
        gamma: GammaConfig | None = None,
        start: StartKind = "text-to-video",
        references_given: bool = False,
    ) -> None:
        assert scheme.K == 0 or references_given or start == "text-to-video"
        self.scheme = scheme
        self.start = start
        self.references_given = references_given
        self.emits_references = scheme.K > 0 and not references_given
        self.fill_steps = scheme.total_steps if self.emits_references else (scheme.N - 1) * scheme.s
        fill = [self._fill_positions(k, start) for k in range(self.fill_steps + 1)]
        cycle = [scheme.positions(m) for m in range(scheme.s + 1)]
        # Given references rest in the queue from the start.
        arriving = (scheme.segments() > 0) | self.emits_references
        self.set_aside = [_run((row == cycle[0]) & arriving) for row in fill]
        """Per fill step: the frames `(first, last + 1)` that stand at their own level there."""
        self.positions = torch.stack(fill + cycle)
        """Denoising steps taken, `[R, B]` int64: fill rows, then the rows of a cycle."""
        self.levels = step_levels(self.positions, scheme.total_steps, gamma)
        """Times, `[R, B]` float32, of the same rows."""

    def _fill_positions(self, step: int, start: StartKind) -> Tensor:
        scheme = self.scheme
        if start == "ramp":
            waiting = self.fill_steps - step
            ramp = (scheme.positions() - waiting).clamp(min=0)
            return torch.where(scheme.segments() == 0, scheme.total_steps, ramp)
        together = torch.full((scheme.buffer_frames,), step)
        if scheme.K and not self.emits_references:
            together[: scheme.K] = scheme.total_steps
        return together

    def row(self, step: int) -> int:
        """Row of :attr:`levels` that step number `step` starts from; it ends at the next row."""
        if step < self.fill_steps:
            return step
        return self.fill_steps + 1 + (step - self.fill_steps) % self.scheme.s

    def to(self, device: torch.device) -> StreamSchedule:
        """Move the times to `device`; positions stay on the CPU, where steps are planned."""
        self.levels = self.levels.to(device)
        return self


def _run(mask: Tensor) -> tuple[int, int] | None:
    """First and last + 1 of the true entries of `mask [B]`, which stand side by side."""
    places = mask.nonzero().flatten().tolist()
    return (places[0], places[-1] + 1) if places else None
