"""Processes that decode clips ahead of an encoder, into memory that they share with it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.child import Child, ChildError
from pipeline.clips import read_clip, read_clip_with_lead

Row = dict[str, Any]


class ClipAddress(NamedTuple):
    """Which frames to decode: the arguments of :func:`pipeline.clips.read_clip`."""

    uri: str
    start_s: float
    frames: int
    fps: float
    height: int
    width: int


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

    def read(self, clips: Sequence[Row]) -> Iterator[tuple[Row, np.ndarray | ChildError]]:
        """Each row of the clip table with its frames, or with what went wrong, in order.

        Frames are `uint8 [t, H, W, 3]` in a slot that the next step may overwrite.
        """
        try:
            for i in range(min(self.slots, len(clips))):
                self._submit(i, clips[i])
            for i, clip in enumerate(clips):
                yield clip, self._result(i, clip)
                if i + self.slots < len(clips):
                    self._submit(i + self.slots, clips[i + self.slots])
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

    def _submit(self, index: int, clip: Row) -> None:
        address = ClipAddress(*(clip[name] for name in ClipAddress._fields))
        lead_from_s = clip["scene_start_s"] if self.with_lead else None
        self.children[index % len(self.children)].submit(
            decode_into,
            self._file,
            self.slots * self.slot_bytes,
            index % self.slots * self.slot_bytes,
            address,
            lead_from_s,
            deadline_s=self.deadline_s,
        )

    def _result(self, index: int, clip: Row) -> np.ndarray | ChildError:
        try:
            self.children[index % len(self.children)].result()
        except ChildError as error:
            return error
        shape = (clip["frames"] + self.with_lead, clip["height"], clip["width"], 3)
        start = index % self.slots * self.slot_bytes
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
