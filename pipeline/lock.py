"""One writing job at a time for a dataset.

Whoever writes holds `.writing.json` and renews it every few seconds. A job that was killed leaves
it behind: on the same machine its process is gone, and from another machine it is known by a note
that no longer changes, so no clocks are compared.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from pipeline.store import DatasetPath, Store, open_store
from streamdit.config import StrictModel
from streamdit.errors import UserError

LOCK_FILE = ".writing.json"
BEAT_S = 10.0
LOOK_S = 1.0
SILENT_S = 90.0
"""A note that has not changed for so long belongs to a job that is gone; network file systems may
show another machine's change a minute late."""


class WriterNote(StrictModel):
    """`.writing.json`: who writes."""

    holder: str
    """Random id of one writing."""
    job: str
    """What it does, as its command is called."""
    host: str
    """Name of the machine."""
    namespace: str
    """Within which `pid` means something."""
    pid: int
    """Process."""
    process_start: str
    """When the process began, in ticks since the machine did; a later one may get its number."""
    beat: int = 0
    """Goes up while the process lives."""

    @classmethod
    def of_this_process(cls, job: str) -> WriterNote:
        """A new note of this process."""
        return cls(
            holder=uuid.uuid4().hex,
            job=job,
            host=socket.gethostname(),
            namespace=_process_namespace(),
            pid=os.getpid(),
            process_start=_running_since(os.getpid()) or "",
        )

    def is_alive(self) -> bool | None:
        """Whether the process is there; none if it cannot be looked for from here."""
        if (self.host, self.namespace) != (socket.gethostname(), _process_namespace()):
            return None
        since = _running_since(self.pid)
        if since is not None:
            return since == self.process_start
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return None


@contextmanager
def writing(
    dataset_dir: DatasetPath, job: str, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Be the one job that writes to a dataset.

    Args:
        dataset_dir: dataset directory or `s3://` prefix; created if missing.
        job: what is done, for the error that another job gets meanwhile.
        say: told why it takes a while, where a job on another machine may have been killed, and
            what is wrong with the lock.

    Raises:
        UserError: if another job writes; or, at the end, if another took this one for dead.
    """
    store = open_store(dataset_dir)
    tell = say or _say_nothing
    is_new = not os.path.isdir(store.root)
    beating = _Heartbeat(store, _take(store, job, tell), tell)
    beating.start()
    try:
        yield
    finally:
        beating.stop()
        beating.release()
        if is_new:
            store.delete_if_empty()  # a job that fails at once leaves no folder behind
    if beating.lost:
        raise UserError(
            f"another job took `{job}` for dead, for it had not renewed "
            f"{store.uri(LOCK_FILE)} for {SILENT_S:g} s, and has written to {store.root} since: "
            "run both again, one after the other; what is done stays"
        )


def _take(store: Store, job: str, tell: Callable[[str], None]) -> WriterNote:
    """Take the lock; returns the note in it.

    Raises:
        UserError: if another job has it.
    """
    note = WriterNote.of_this_process(job)
    freed = False
    while True:
        # Whoever asks again because the first answer was lost finds its own note.
        if store.create_text(LOCK_FILE, _as_text(note)) or _is_held(store, note):
            if not freed:
                return note
            time.sleep(LOOK_S)  # another that freed it too may have taken this note for the old one
            if _is_held(store, note):
                return note
        freed = _wait_until_gone(store, tell) or freed


def _wait_until_gone(store: Store, tell: Callable[[str], None]) -> bool:
    """Return once the lock is free; tells whether it was freed here, for its job is gone.

    Raises:
        UserError: if the job lives.
    """
    first = _text(store)
    if first is None:
        time.sleep(LOOK_S)
        return False
    note = _parse(first)
    alive = note.is_alive() if note else None
    if alive:
        raise _busy(store, note)
    if alive is None:
        who = f"`{note.job}` on {note.host}" if note else "another job"
        tell(f"{who} was writing to {store.root}; looking whether it still is ...")
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            seen = _text(store)
            if seen is None:
                return False
            if seen != first:
                raise _busy(store, _parse(seen) or note)
    if _text(store) == first:
        store.delete(LOCK_FILE)
    return True


def _busy(store: Store, note: WriterNote | None) -> UserError:
    who = f"`{note.job}` (process {note.pid} on {note.host})" if note else "another job"
    return UserError(
        f"{who} is writing to {store.root}: wait until it has finished, or stop it, and run this "
        "command again"
    )


class _Heartbeat:
    """Renews a note from a thread of its own."""

    def __init__(self, store: Store, note: WriterNote, tell: Callable[[str], None]) -> None:
        self.store = store
        self.note = note
        self.tell = tell
        self.lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dataset-lock", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; returns when no more is written."""
        self._over.set()
        self._thread.join()

    def release(self) -> None:
        """Give the lock back; storage that fails now leaves it to the next job to see it is free.

        What the job itself came to is not to be hidden by that.
        """
        try:
            self._look()
            if not self.lost:
                self.store.delete(LOCK_FILE)
        except OSError as error:
            self.tell(f"{self.store.uri(LOCK_FILE)} cannot be removed: {error}")

    def _look(self) -> None:
        """Notice, and say once, if the note is another's."""
        if not self.lost and not _is_held(self.store, self.note):
            self.lost = True
            self.tell(
                f"another job took this one for dead and writes to {self.store.root} too: stop one "
                "of them"
            )

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                self._look()
                if self.lost:
                    return
                self.note = self.note.model_copy(update={"beat": self.note.beat + 1})
                self.store.write_text(LOCK_FILE, _as_text(self.note))
            except Exception as error:
                # Storage that does not answer now, whatever its library raises, may do so later.
                self.tell(f"{self.store.uri(LOCK_FILE)} cannot be renewed: {error}")


def _say_nothing(text: str) -> None:
    pass


def _running_since(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; none if it cannot be seen.

    Never from the clock: it may be set while the process runs. One that has ended, and waits for
    its parent to notice, began never.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _process_namespace() -> str:
    """What tells apart machines, and containers of one machine, that have one name."""
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _as_text(note: WriterNote) -> str:
    return note.model_dump_json() + "\n"


def _text(store: Store) -> str | None:
    try:
        return store.read_text(LOCK_FILE)
    except FileNotFoundError:
        return None


def _parse(text: str) -> WriterNote | None:
    """The note; none of one that is being written, or of another version."""
    try:
        return WriterNote.model_validate_json(text)
    except ValidationError:
        return None


def _is_held(store: Store, note: WriterNote) -> bool:
    """Whether the lock is there, with the holder of `note`."""
    text = _text(store)
    found = _parse(text) if text else None
    return found is not None and found.holder == note.holder
