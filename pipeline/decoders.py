"""Processes that decode clips ahead of an encoder, into memory that they share with it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.child import CRASHED, KILLED, TIMED_OUT, Call, Child, ChildError
from pipeline.clips import read_clip, read_clip_with_lead

Row = dict[str, Any]

TAKE_DECODER = (CRASHED, KILLED, TIMED_OUT)
"""Error classes after which a source is left alone for the rest of a run."""

Blocked = dict[str, ChildError]
"""Sources that are left alone, each with what is said of its clips."""


def quarantine(retryable: bool = False) -> ChildError:
    """What is said of the clips of a source that is left alone."""
    reason = "another clip of this video, or an earlier stage, crashed or hung its decoder"
    return ChildError("Quarantined", reason, retryable)


class ClipAddress(NamedTuple):
    """Which frames to decode: the arguments of :func:`pipeline.clips.read_clip`."""

    uri: str
    start_s: float
    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class _Job:
    """A clip on its way."""

    clip: Row
    child: Child
    call: Call
    slot: int


class DecoderPool:
    """Decodes clips in child processes, some ahead of their use.

    Frames come back through a ring of slots in shared memory, without being copied through a pipe.
    The memory has no name, so nothing is left of it however the processes end.

    Args:
        decoders: child processes.
        ahead: clips decoded ahead; as many slots hold them.
        slot_bytes: bytes of the largest clip.
        with_lead: decode one more frame before each clip, see
            :func:`pipeline.clips.read_clip_with_lead`.
        deadline_s: longest time for one clip.
        threads: CPU threads of a child.
    """

    def __init__(
        self,
        decoders: int,
        ahead: int,
        slot_bytes: int,
        *,
        with_lead: bool,
        deadline_s: float,
        threads: int = 1,
    ) -> None:
        self.slots = max(ahead, decoders)
        self.slot_bytes = slot_bytes
        self.with_lead = with_lead
        self.deadline_s = deadline_s
        self._file = _anonymous_file(self.slots * slot_bytes)
        self._memory = np.frombuffer(mmap.mmap(self._file, self.slots * slot_bytes), np.uint8)
        self.children = [Child(threads, inherited=(self._file,)) for _ in range(decoders)]

    def read(
        self, clips: Sequence[Row], blocked: Blocked
    ) -> Iterator[tuple[Row, np.ndarray | ChildError]]:
        """Each row of the clip table with its frames, or with what went wrong, in order.

        A source that takes a decoder along, or its deadline, joins `blocked`: its other clips are
        not tried, because each try would cost a process or a deadline.

        Frames are `uint8 [t, H, W, 3]` in a slot that the next step may overwrite.
        """
        free = deque(range(self.slots))
        jobs: deque[_Job | Row] = deque()
        rest = deque(clips)
        try:
            while rest or jobs:
                while rest and (free or rest[0]["source_id"] in blocked):
                    clip = rest.popleft()
                    is_blocked = clip["source_id"] in blocked
                    jobs.append(clip if is_blocked else self._submit(clip, free.popleft()))
                job = jobs.popleft()
                if not isinstance(job, _Job):
                    yield job, blocked[job["source_id"]]
                    continue
                frames = self._result(job)
                if isinstance(frames, ChildError) and frames.error_class in TAKE_DECODER:
                    blocked[job.clip["source_id"]] = quarantine(frames.retryable)
                    jobs = self._without(job.clip["source_id"], jobs, free)
                yield job.clip, frames
                free.append(job.slot)
        finally:
            self._drop_pending()

    def close(self) -> None:
        """End the children."""
        for child in self.children:
            child.close()

    def __del__(self) -> None:
        if hasattr(self, "children"):
            self.close()
            os.close(self._file)

    def _drop_pending(self) -> None:
        """End children whose results nobody will take, because the encoder failed."""
        for child in self.children:
            if child.waiting:
                child.close()

    def _submit(self, clip: Row, slot: int) -> _Job:
        """Have the child with the least to do decode a clip into a slot."""
        child = min(self.children, key=lambda child: len(child.waiting))
        address = ClipAddress(*(clip[name] for name in ClipAddress._fields))
        lead_from_s = clip["scene_start_s"] if self.with_lead else None
        call = child.submit(
            decode_into,
            self._file,
            self.slots * self.slot_bytes,
            slot * self.slot_bytes,
            address,
            lead_from_s,
            deadline_s=self.deadline_s,
        )
        return _Job(clip, child, call, slot)

    def _without(
        self, source_id: str, jobs: deque[_Job | Row], free: deque[int]
    ) -> deque[_Job | Row]:
        """`jobs` with the clips of a source taken back, and their slots set free."""
        mine = [j for j in jobs if isinstance(j, _Job) and j.clip["source_id"] == source_id]
        for child in self.children:
            child.cancel({job.call for job in mine})
        free.extend(job.slot for job in mine)
        return deque(job.clip if job in mine else job for job in jobs)

    def _result(self, job: _Job) -> np.ndarray | ChildError:
        try:
            job.child.result()
        except ChildError as error:
            return error
        clip = job.clip
        shape = (clip["frames"] + self.with_lead, clip["height"], clip["width"], 3)
        start = job.slot * self.slot_bytes
        return self._memory[start : start + int(np.prod(shape))].reshape(shape)


def decode_into(
    file: int, size: int, offset: int, address: ClipAddress, lead_from_s: float | None
) -> None:
    """Decode a clip into shared memory, in a child process.

    Args:
        file: descriptor of the memory.
        size: its bytes.
        offset: where the frames go.
        address: which frames.
        lead_from_s: start of the scene, if one more frame before the clip is wanted.
    """
    if lead_from_s is None:
        frames = read_clip(*address)
    else:
        frames = read_clip_with_lead(*address, lead_from_s)
    memory = _mapped(file, size)
    memory[offset : offset + frames.nbytes] = frames.reshape(-1)


@lru_cache(maxsize=1)
def _mapped(file: int, size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(file, size), np.uint8)


def _anonymous_file(size: int) -> int:
    """Descriptor of memory without a name; of an unnamed file where the system has no such."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("clips")
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    os.ftruncate(file, size)
    return file
