"""Processes that tests start, and all that these start: none is left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


def kill_tree(process: subprocess.Popen) -> None:
    """`kill -9` of a process and of all that it started, in whatever sessions; waits for them."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(30)
    psutil.wait_procs(family, timeout=30)


@contextmanager
def started(*command, **options) -> Iterator[subprocess.Popen]:
    """A process whose output is text; it is killed, with its family, if it is left alive."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([str(word) for word in command], **settings | options)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def run(*command, timeout: float, **options) -> tuple[int, str]:
    """Exit status of a command, and what it said; after `timeout` seconds all of it is killed."""
    with started(*command, **options) as process:
        said, _ = process.communicate(timeout=timeout)
        return process.returncode, said
