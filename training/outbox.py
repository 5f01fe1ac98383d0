"""Records on their way to a server that may be away: sent in order, by a thread of their own.

While the server does not take them they lie in a file, so that not even the end of the process
loses them; whoever opens the same file later sends them on.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Call = dict[str, Any]
"""One record: JSON values, with its `kind`."""

RETRY_AFTER_S = 15.0
CLOSE_WAIT_S = 10.0

MOST_REASON = 300
"""Characters of an error that are shown."""


class Outbox:
    """Sends records in the background.

    Args:
        send: takes the oldest records and returns how many of them it has dealt with (at least
            one). Whatever it raises, it is asked again later.
        path: where records wait while the server is away; None keeps them in memory only.
        retry_after_s: seconds between attempts then; default :data:`RETRY_AFTER_S`.
    """

    def __init__(
        self,
        send: Callable[[list[Call]], int],
        path: Path | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self._send = send
        self._path = path
        self._retry_after_s = RETRY_AFTER_S if retry_after_s is None else retry_after_s
        self._waiting: deque[Call] = deque(_read(path))
        self._away = False
        self._closing_at: float | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        """Hand in a record; returns at once."""
        with self._changed:
            self._waiting.append(call)
            if self._away:
                self._keep([call])
            self._changed.notify()

    def close(self, wait_s: float | None = None) -> int:
        """Send what is left.

        A server that is away is tried for about `wait_s` seconds (:data:`CLOSE_WAIT_S`); one that
        takes records is given the time that it needs, for they may be large.

        Returns:
            Records that could not be sent; they stay in the file.
        """
        wait_s = CLOSE_WAIT_S if wait_s is None else wait_s
        with self._changed:
            self._closing_at = time.monotonic() + wait_s
            self._changed.notify()
        self._thread.join(wait_s)
        with self._changed:
            if self._waiting and self._thread.is_alive():
                self._keep(list(self._waiting), anew=True)  # whoever ends the process now may
                logger.warning("waiting until the last records are sent: %d", len(self._waiting))
        self._thread.join()
        if self._waiting:
            self._keep(list(self._waiting), anew=True)
        return len(self._waiting)

    def _work(self) -> None:
        pause_s = 0.0
        while True:
            with self._changed:
                if pause_s:
                    self._changed.wait_for(lambda: self._closing_at is not None, pause_s)
                self._changed.wait_for(lambda: self._waiting or self._closing_at is not None)
                calls = list(self._waiting)
            if not calls:
                return
            try:
                self._sent(self._send(calls))
                pause_s = 0.0
            except Exception as error:  # libraries between here and the server raise their own
                self._is_away(error)
                pause_s = self._retry_after_s
                if self._closing_at is not None:
                    if time.monotonic() >= self._closing_at:
                        return
                    time.sleep(min(1.0, pause_s))

    def _sent(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._waiting.popleft()
            if self._waiting:
                return
            if self._away:
                self._away = False
                logger.warning("the server takes records again; all that waited are sent")
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _is_away(self, error: Exception) -> None:
        with self._changed:
            if self._away:
                return
            self._away = True
            self._keep(list(self._waiting), anew=True)
        reason = (str(error) or type(error).__name__).splitlines()[0][:MOST_REASON]
        where = f" in {self._path}" if self._path else ""
        logger.warning(
            "the server takes no records now (%s ...); they wait%s and the run goes on",
            reason,
            where,
        )

    def _keep(self, calls: list[Call], anew: bool = False) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w" if anew else "a") as file:
            file.writelines(json.dumps(call) + "\n" for call in calls)


def _read(path: Path | None) -> list[Call]:
    """Records that an earlier process could not send; a cut last line is left out."""
    if path is None or not path.is_file():
        return []
    with path.open() as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]
