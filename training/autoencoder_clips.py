"""Curated clips as frames, in the order in which the autoencoder's trainer meets them.

Which clip, which frames of it and which part of the picture is a pure function of
(seed, step, index), so a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.clips import read_clip
from pipeline.schema import read_clips
from pipeline.select import split_of
from streamdit.errors import UserError

BATCHES_AHEAD = 2
UNREADABLE_IN_A_ROW = 8

log = logging.getLogger(__name__)


class Clips:
    """Clips of one split, decoded on demand and kept in memory up to a limit.

    Args:
        rows: rows of the clip table (`pipeline.schema.CLIP_SCHEMA`).
        cache_mb: megabytes of decoded frames to keep.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], cache_mb: float) -> None:
        self.rows = list(rows)
        self._limit = int(cache_mb * 2**20)
        self._held = 0
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def frames(self, index: int) -> np.ndarray:
        """Frames `uint8 [t, H, W, 3]` of clip `index`.

        A clip that cannot be read any more is reported, and the next one taken in its place.

        Raises:
            UserError: if several clips in a row cannot be read.
        """
        for attempt in range(UNREADABLE_IN_A_ROW):
            place = (index + attempt) % len(self.rows)
            try:
                return self._read(place)
            except Exception as error:  # whatever a decoder raises: only this one clip is lost
                reason = " ".join(str(error).split()) or type(error).__name__
                row = self.rows[place]
                log.warning(
                    "clip %s (%s at %.3f s) is left out: %s",
                    row["clip_id"], row["uri"], row["start_s"], reason,
                )  # fmt: skip
        raise UserError(
            f"{UNREADABLE_IN_A_ROW} clips in a row cannot be read, the last because of: {reason}; "
            "check that the videos of the dataset are where they were when it was curated"
        )

    def _read(self, index: int) -> np.ndarray:
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        row = self.rows[index]
        frames = read_clip(
            row["uri"], row["start_s"], row["frames"], row["fps"], row["height"], row["width"]
        )
        with self._lock:
            if index not in self._cache:
                self._cache[index] = frames
                self._held += frames.nbytes
            while self._held > self._limit:
                self._held -= self._cache.popitem(last=False)[1].nbytes
        return frames

    def sample(self, count: int, seed: int) -> Iterator[np.ndarray]:
        """Whole frames of `count` clips (or all, if fewer), a fixed choice by `seed`."""
        for index in permutation(len(self), seed, 0)[:count]:
            yield self.frames(int(index))

    def fingerprint(self) -> str:
        """Hash of the clips' ids."""
        return hashlib.sha256("\n".join(row["clip_id"] for row in self.rows).encode()).hexdigest()


def open_clips(
    dataset_dir: Path | str, held_out_share: float, cache_mb: float
) -> tuple[Clips, Clips]:
    """Training and held-out clips of a curated dataset; the second may be empty.

    Raises:
        UserError: if there is no clip table, or no clip to train on.
    """
    rows = read_clips(dataset_dir).to_pylist()
    split: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    for row in rows:
        split[split_of(row["source_id"], held_out_share)].append(row)
    if not split["train"]:
        raise UserError(
            f"dataset {dataset_dir} has no clips to train on ({len(rows)} in all, held_out_share "
            f"{held_out_share}); ingest more videos or lower held_out_share"
        )
    return Clips(split["train"], cache_mb), Clips(split["held_out"], cache_mb / 8)


def sample_window(
    clips: Clips, seed: int, batch: int, step: int, index: int, frames: int, crop: tuple[int, int]
) -> np.ndarray:
    """Sample `index` of the batch of `step`: `uint8 [frames, *crop, 3]`."""
    epoch, position = divmod(step * batch + index, len(clips))
    clip = clips.frames(int(permutation(len(clips), seed, epoch)[position]))
    generator = np.random.default_rng([seed, step, index])
    sizes = (frames, *crop)
    starts = [
        generator.integers(whole - part + 1)
        for whole, part in zip(clip.shape[:3], sizes, strict=True)
    ]
    t, y, x = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return clip[t, y, x]


def batches(
    clips: Clips,
    seed: int,
    batch: int,
    frames: int,
    crop: tuple[int, int],
    first_step: int,
    workers: int,
    pin: bool,
) -> Iterator[Tensor]:
    """Batches `uint8 [b, t, h, w, 3]` from `first_step` on, without end.

    `workers` threads decode ahead; `pin` puts batches in page-locked memory, for a fast copy to
    the device.
    """
    pending: deque[list[Future[np.ndarray]]] = deque()
    step = first_step
    with ThreadPoolExecutor(workers, thread_name_prefix="clips") as pool:
        try:
            while True:
                while len(pending) <= BATCHES_AHEAD:
                    pending.append(
                        [
                            pool.submit(sample_window, clips, seed, batch, step, i, frames, crop)
                            for i in range(batch)
                        ]
                    )
                    step += 1
                samples = [future.result() for future in pending.popleft()]
                stacked = torch.from_numpy(np.stack(samples))
                yield stacked.pin_memory() if pin else stacked
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of `count` clips in `epoch`."""
    return np.random.default_rng([seed, epoch]).permutation(count)
