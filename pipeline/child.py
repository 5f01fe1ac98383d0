"""A child process that runs functions under a deadline.

Decoders crash, and some spin for ever while they hold the interpreter's lock. What they do
therefore happens in a child that can be killed, and that is started again for the next call.
The child is a fresh interpreter (not a fork: a Ray worker has threads), lives as long as its
parent, and takes calls one after another.
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
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ALARM_GRACE_S = 10
PARENT_CHECK_S = 1.0
CRASHED = "DecoderCrashed"
TIMED_OUT = "DeadlineExceeded"
"""Error classes of a call that took its process with it, or its deadline."""


class ChildError(RuntimeError):
    """A call in the child did not return: what it was, and whether to try again."""

    def __init__(self, error_class: str, message: str, retryable: bool) -> None:
        super().__init__(f"{error_class}: {message}")
        self.error_class = error_class
        self.message = message
        self.retryable = retryable


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
        self.waiting: deque[tuple[Callable[..., Any], tuple[Any, ...], float]] = deque()

    def call(self, function: Callable[..., Any], *args: Any, deadline_s: float) -> Any:
        """Run `function(*args)` in the child and return its result.

        Raises:
            ChildError: if it raised, crashed its process, or took longer than `deadline_s`.
        """
        assert not self.waiting, "results of submitted calls must be taken first"
        self.submit(function, *args, deadline_s=deadline_s)
        return self.result()

    def submit(self, function: Callable[..., Any], *args: Any, deadline_s: float) -> None:
        """Start a call whose result :meth:`result` will return."""
        if self.process is not None and not self.waiting and self.process.poll() is not None:
            self.close()  # killed from outside while it was idle
        self._start()
        call = (function, args, deadline_s)
        self.waiting.append(call)
        self._send(call)

    def result(self) -> Any:
        """Result of the oldest submitted call; raises as :meth:`call` does.

        A call whose process ends gets a second one: the first may have been killed from outside,
        for want of memory say, and only an input that does it twice is to blame.
        """
        function, _, deadline_s = self.waiting[0]
        try:
            try:
                answered, answer = self._receive(deadline_s)
            except (EOFError, OSError):
                self._restart()
                answered, answer = self._receive(deadline_s)
        except (EOFError, OSError):
            self.waiting.popleft()
            code = self._restart()
            raise ChildError(
                CRASHED, f"{function.__name__} ended its process twice ({code})", False
            ) from None
        self.waiting.popleft()
        if not answered:
            self._restart()
            raise ChildError(TIMED_OUT, f"{function.__name__} took over {deadline_s:g} s", False)
        outcome, value = answer
        if outcome == "error":
            raise ChildError(*value)
        return value

    def _receive(self, deadline_s: float) -> tuple[bool, Any]:
        """Whether an answer came in time, and the answer."""
        answered = self.connection.poll(deadline_s)
        return answered, self.connection.recv() if answered else None

    def close(self) -> None:
        """End the child; calls under way are lost."""
        self.waiting.clear()
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        if self.process is not None:
            return
        self.connection, theirs = Pipe()
        room = str(Path(__file__).resolve().parent.parent)
        paths = [room, os.environ.get("PYTHONPATH", "")]
        handle = theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.child", str(handle), str(self.threads)],
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

    def _send(self, call: tuple[Callable[..., Any], tuple[Any, ...], float]) -> None:
        # A broken pipe means that an earlier call ended the child: that call's result() says so,
        # starts a new child, and sends this call again.
        with contextlib.suppress(OSError):
            self.connection.send(call)

    def _restart(self) -> str:
        """Kill the child and send the calls still waiting to a new one; returns how it ended."""
        assert self.process is not None
        self.process.poll()
        if self.process.returncode is None and not self._gone():
            self.process.kill()
        code = self.process.wait()
        self.connection.close()
        self.process = None
        if self.waiting:
            self._start()
            for call in self.waiting:
                self._send(call)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _gone(self) -> bool:
        """Whether the child ends by itself within a moment (its pipe closes a little before)."""
        assert self.process is not None
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            return False
        return True


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


def serve(connection: Connection, threads: int) -> None:
    """Answer calls until the parent is gone."""
    import cv2

    cv2.setNumThreads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            function, args, deadline_s = connection.recv()
        except EOFError:
            return
        # If the parent dies, nobody else ends a decoder that holds the interpreter's lock (which
        # the thread that watches the parent needs too): the alarm's default action needs none.
        signal.alarm(math.ceil(deadline_s) + ALARM_GRACE_S)
        try:
            answer = ("ok", function(*args))
        except Exception as error:
            answer = ("error", describe_error(error))
        signal.alarm(0)
        try:
            connection.send(answer)
        except OSError:
            return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
