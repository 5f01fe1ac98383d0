"""A request to stop: noticed by one worker, obeyed by all at the same step."""

from __future__ import annotations

import signal
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from training.engine import World


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class StopRequest:
    """Remembers a SIGTERM, so that the loop can save its state and stop.

    Args:
        world: the workers that have to agree.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        try:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread (a Ray Train worker): Ray stops it itself
            self._previous = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, signum: int, frame: Any) -> None:
        self.requested = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        flag = torch.tensor([int(self.requested)], device=self.world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
