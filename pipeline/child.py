"""A child process that runs functions under a deadline.

Decoders crash, and some spin for ever while they hold the interpreter's lock. What they do
therefore happens in a child that can be killed, and that is started again for the next call.
The child is a fresh interpreter (not a fork: a Ray worker has threads), lives as long as its
parent, and takes calls one after another.

A long call tells that it gets on (:func:`report_progress`); its deadline then counts from there, so
that it ends decoders that hang and not videos that are long.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ALARM_GRACE_S = 10
PARENT_CHECK_S = 1.0
ENDING_S = 0.5
"""A process ends a little after its pipe closes."""
KILL_ENDING = "signal SIGKILL"
PROGRESS_S = 1.0
ALIVE = "alive"
CRASHED = "DecoderCrashed"
KILLED = "DecoderKilled"
TIMED_OUT = "DeadlineExceeded"
"""Error classes of a call that took its process with it, whose process was killed from outside (for
want of memory, say), or that took longer than its deadline."""


class ChildError(RuntimeError):
    """A call in the child did not return: what it was, and whether to try again."""

    def __init__(self, error_class: str, message: str, retryable: bool) -> None:
        super().__init__(f"{error_class}: {message}")
        self.error_class = error_class
        self.message = message
        self.retryable = retryable


@dataclass(frozen=True, eq=False)
class Call:
    """A call that was submitted to a child."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    deadline_s: float


class Child:
    """Runs functions of importable modules in one child process.

    Calls may be submitted ahead; results come in order. The next call runs while the result of
    the one before is used, and waits with its own result until that is asked for.
    """

    def __init__(self, threads: int = 1, inherited: tuple[int, ...] = ()) -> None:
        """Nothing is started yet.

        Args:
            threads: CPU threads of the child.
            inherited: file descriptors that the child gets, under the same numbers.
        """
        self.threads = threads
        self.inherited = inherited
        self.process: subprocess.Popen[bytes] | None = None
        self.waiting: deque[Call] = deque()

    def call(self, function: Callable[..., Any], *args: Any, deadline_s: float) -> Any:
        """Run `function(*args)` in the child and return its result.

        Raises:
            ChildError: if it raised, crashed its process, or went on for `deadline_s` without a
                result or a sign of progress.
        """
        assert not self.waiting, "results of submitted calls must be taken first"
        self.submit(function, *args, deadline_s=deadline_s)
        return self.result()

    def submit(self, function: Callable[..., Any], *args: Any, deadline_s: float) -> Call:
        """Start a call whose result :meth:`result` will return."""
        if self.process is not None and not self.waiting and self.process.poll() is not None:
            self.close()  # killed from outside while it was idle
        call = Call(function, args, deadline_s)
        self.waiting.append(call)
        if self.process is None:
            self._start()
        else:
            self._send(call)
        return call

    def cancel(self, calls: Collection[Call]) -> None:
        """Forget submitted calls, and end the process that may be at one of them."""
        if any(call in calls for call in self.waiting):
            self.waiting = deque(call for call in self.waiting if call not in calls)
            self._kill()

    def result(self) -> Any:
        """Result of the oldest submitted call; raises as :meth:`call` does.

        A call whose process ends gets a second one: the first may have been killed from outside,
        for want of memory say, and only an input that does it twice is to blame.
        """
        call = self.waiting[0]
        try:
            try:
                answer = self._receive(call.deadline_s)
            except (EOFError, OSError):
                self._end()
                answer = self._receive(call.deadline_s)
        except (EOFError, OSError):
            self.waiting.popleft()
            ending = self._end()
            killed = ending == KILL_ENDING  # a crash ends otherwise: somebody else did that
            reason = f"{call.function.__name__} ended its process twice ({ending})"
            raise ChildError(KILLED if killed else CRASHED, reason, killed) from None
        self.waiting.popleft()
        if answer is None:
            self._kill()
            reason = f"{call.function.__name__} took over {call.deadline_s:g} s"
            raise ChildError(TIMED_OUT, reason, False)
        outcome, value = answer
        if outcome == "error":
            raise ChildError(*value)
        return value

    def _receive(self, deadline_s: float) -> tuple[str, Any] | None:
        """Outcome and value of the oldest call; none if the deadline passes."""
        if self.process is None:
            self._start()
        while self.connection.poll(deadline_s):
            outcome, value = self.connection.recv()
            if outcome != ALIVE:
                return outcome, value
        return None

    def close(self) -> None:
        """End the child; calls under way are lost."""
        self.waiting.clear()
        self._kill()

    def _start(self) -> None:
        """Start a process and send it what waits."""
        self.connection, theirs = Pipe()
        room = str(Path(__file__).resolve().parent.parent)
        paths = [room, os.environ.get("PYTHONPATH", "")]
        handle = theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(handle), str(self.threads)],
            pass_fds=(handle, *self.inherited),
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "OMP_NUM_THREADS": str(self.threads),
                "OPENBLAS_NUM_THREADS": str(self.threads),
            },
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        for call in self.waiting:
            self._send(call)

    def _send(self, call: Call) -> None:
        # A broken pipe means that an earlier call ended the child: that call's result() says so,
        # and a new child gets this call again.
        with contextlib.suppress(OSError):
            self.connection.send((call.function, call.args, call.deadline_s))

    def _end(self) -> str:
        """See the process off; a new one starts with what still waits. Returns how it ended."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_S)
        code = self.process.returncode
        self._kill()
        if code is None:
            return "it had to be killed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _kill(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.wait()
            self.process = None


_shared = threading.local()


def shared_child(threads: int = 1) -> Child:
    """The calling thread's child, started at first use."""
    child: Child | None = getattr(_shared, "child", None)
    if child is None or child.threads != threads:
        if child is not None:
            child.close()
        child = _shared.child = Child(threads)
    return child


def close_shared_child() -> None:
    """End the calling thread's child, if it has one."""
    child: Child | None = getattr(_shared, "child", None)
    if child is not None:
        child.close()
        _shared.child = None


def describe_error(error: Exception) -> tuple[str, str, bool]:
    """Class, one-line message, and whether the same input may work at another time."""
    message = " ".join(str(error).split()) or type(error).__name__
    transient = isinstance(error, (PermissionError, ConnectionError, TimeoutError, MemoryError))
    return type(error).__name__, message, transient


def end_with_parent(parent: int) -> None:
    """End this process soon after the process `parent` is gone, in the middle of a call too."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


class _Progress:
    """Tells the parent now and then that a call gets on."""

    def __init__(self, connection: Connection, deadline_s: float) -> None:
        self.connection = connection
        self.deadline_s = deadline_s
        self.interval_s = min(PROGRESS_S, deadline_s / 4)
        self.told_s = time.monotonic()

    def tell(self) -> None:
        now_s = time.monotonic()
        if now_s - self.told_s >= self.interval_s:
            self.told_s = now_s
            self.set_alarm()
            self.connection.send((ALIVE, None))

    def set_alarm(self) -> None:
        # If the parent dies, nobody else ends a decoder that holds the interpreter's lock (which
        # the thread that watches the parent needs too): the alarm's default action needs none.
        signal.alarm(math.ceil(self.deadline_s) + ALARM_GRACE_S)


_progress: _Progress | None = None


def report_progress() -> None:
    """Give the call under way its whole deadline again; outside a child this does nothing."""
    if _progress is not None:
        _progress.tell()


def serve(connection: Connection, threads: int) -> None:
    """Answer calls until the parent is gone."""
    import cv2

    global _progress
    cv2.setNumThreads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            function, args, deadline_s = connection.recv()
        except EOFError:
            return
        _progress = _Progress(connection, deadline_s)
        _progress.set_alarm()
        try:
            answer = ("ok", function(*args))
        except Exception as error:
            answer = ("error", describe_error(error))
        signal.alarm(0)
        _progress = None
        try:
            connection.send(answer)
        except OSError:
            return


START = "from pipeline.child import main; main()"
"""What a child runs: this module under its own name, so that `report_progress` finds its state."""


def main() -> None:
    """Serve the parent that started this process."""
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
