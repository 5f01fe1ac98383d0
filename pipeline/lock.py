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

import psutil
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
    process_start: float
    """When the process began; a later one may get its number."""
    beat: int = 0
    """Goes up while the process lives."""

    @classmethod
    def of_this_process(cls, job: str) -> WriterNote:
        """A new note of this process."""
        process = psutil.Process()
        return cls(
            holder=uuid.uuid4().hex,
            job=job,
            host=socket.gethostname(),
            namespace=_process_namespace(),
            pid=process.pid,
            process_start=process.create_time(),
        )

    def is_alive(self) -> bool | None:
        """Whether the process is there; none if it cannot be looked for from here."""
        if (self.host, self.namespace) != (socket.gethostname(), _process_namespace()):
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_start) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return None


@contextmanager
def writing(
    dataset_dir: DatasetPath, job: str, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Be the one job that writes to a dataset.

    Args:
        dataset_dir: dataset directory or `s3://` prefix; created if missing.
        job: what is done, for the error that another job gets meanwhile.
        on_wait: told why it takes a while, where a job on another machine may have been killed.

    Raises:
        UserError: if another job writes; or, at the end, if another took this one for dead.
    """
    store = open_store(dataset_dir)
    note = WriterNote.of_this_process(job)
    while not store.create_text(LOCK_FILE, _as_text(note)):
        _wait_until_gone(store, on_wait)
    beating = _Heartbeat(store, note)
    beating.start()
    try:
        yield
    finally:
        beating.stop()
        if _read(store, note.holder) is not None:
            store.delete(LOCK_FILE)
    if beating.lost:
        raise UserError(
            f"another job took `{job}` for dead, for it had not renewed "
            f"{store.uri(LOCK_FILE)} for {SILENT_S:g} s, and has written to {store.root} since: "
            "run both again, one after the other; what is done stays"
        )


def _wait_until_gone(store: Store, on_wait: Callable[[str], None] | None) -> None:
    """Return once the lock is free, or free it if its job is gone.

    Raises:
        UserError: if the job lives.
    """
    first = _text(store)
    if first is None:
        return
    note = _parse(first)
    alive = note.is_alive() if note else None
    if alive:
        raise _busy(store, note)
    if alive is None:
        if on_wait is not None:
            who = f"`{note.job}` on {note.host}" if note else "another job"
            on_wait(f"{who} was writing to {store.root}; looking whether it still is ...")
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            seen = _text(store)
            if seen is None:
                return
            if seen != first:
                raise _busy(store, _parse(seen) or note)
    if _text(store) == first:
        store.delete(LOCK_FILE)


def _busy(store: Store, note: WriterNote | None) -> UserError:
    who = f"`{note.job}` (process {note.pid} on {note.host})" if note else "another job"
    return UserError(
        f"{who} is writing to {store.root}: wait until it has finished, or stop it, and run this "
        "command again"
    )


class _Heartbeat:
    """Renews a note from a thread of its own."""

    def __init__(self, store: Store, note: WriterNote) -> None:
        self.store = store
        self.note = note
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

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if _read(self.store, self.note.holder) is None:
                    self.lost = True
                    return
                self.note = self.note.model_copy(update={"beat": self.note.beat + 1})
                self.store.write_text(LOCK_FILE, _as_text(self.note))
            except OSError:
                continue  # storage that does not answer now may do so at the next beat


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


def _read(store: Store, holder: str) -> WriterNote | None:
    """The note, if it is the holder's."""
    text = _text(store)
    note = _parse(text) if text else None
    return note if note and note.holder == holder else None
