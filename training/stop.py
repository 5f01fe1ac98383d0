"""A request to stop: noticed by one worker, obeyed by all at the same step."""

from __future__ import annotations

import ctypes
import logging
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from training.engine import World

logger = logging.getLogger(__name__)

MAIN_THREAD_WAIT_S = 30.0


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class StopRequest:
    """Remembers a SIGTERM, so that the loop can save its state and stop.

    Each step the ranks tell each other whether they were asked: :meth:`ask` starts the exchange
    and the answer arrives while the step goes on, so it costs no waiting.

    Args:
        world: the workers that have to agree.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.requested = False
        self._previous: Any = None
        self._vote: tuple[dist.Work | None, torch.Tensor] | None = None

    def __enter__(self) -> StopRequest:
        self._set_handler(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            self._set_handler(self._previous)

    def _set_handler(self, handler: Any) -> None:
        def exchange() -> None:
            self._previous = signal.signal(signal.SIGTERM, handler)

        if not in_main_thread(exchange):
            logger.warning("SIGTERM is not listened to: the main thread of this worker is busy")

    def _note(self, signum: int, frame: Any) -> None:
        if not self.requested:
            logger.warning("rank %d was asked to stop; it ends what must be whole", self.world.rank)
        self.requested = True

    def ask(self) -> None:
        """Begin to ask all ranks whether to stop after this step; every rank calls this."""
        flag = torch.tensor([int(self.requested)])
        work = None
        if self.world.size > 1:
            group = self.world.control
            work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group, async_op=True)
        self._vote = work, flag

    def asked(self) -> bool:
        """Whether any rank was asked by now; every rank calls this, and waits for the others."""
        self.ask()
        return self.agreed()

    def agreed(self) -> bool:
        """Whether any rank had been asked by the last :meth:`ask`; the same on every rank."""
        assert self._vote is not None, "ask() comes first"
        work, flag = self._vote
        self._vote = None
        if work is not None:
            work.wait()
        return bool(flag.item())


def in_main_thread(call: Callable[[], None]) -> bool:
    """Run `call` in the main thread, where alone Python lets signal handlers be set.

    In a Ray Train worker the loop runs in another thread. The interpreter runs pending calls in
    the main thread as soon as that executes any Python.

    Returns:
        Whether it was run; False if the main thread did not come to it in time.
    """
    if threading.current_thread() is threading.main_thread():
        call()
        return True
    done = threading.Event()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def pending(_: int | None) -> int:
        call()
        done.set()
        return 0

    # A call that comes late must still find its function alive.
    _pending_calls.append(pending)
    ctypes.pythonapi.Py_AddPendingCall(pending, None)
    return done.wait(MAIN_THREAD_WAIT_S)


_pending_calls: list[Any] = []
