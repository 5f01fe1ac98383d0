"""Which clips are trained on when.

The order is a pure function of (seed, step): the whole state of the loader is one integer, and a
resumed run sees what the uninterrupted one would have seen, on any number of workers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Positions = Sequence[int] | NDArray[np.int64]
"""Places of clips in a data set."""


class BatchOrder:
    """Which clips make up global batch number `step`; a pure function of (seed, step).

    Each bucket's clips form an endless sequence of shuffled epochs that is cut into global
    batches, so what is left of one epoch begins the next. Within an epoch the buckets take turns at
    random; a batch never mixes buckets.

    A shuffle of all clips would read a whole row group for every single clip, once the row groups
    do not fit in memory. So row groups are shuffled, and each clip comes at random within the
    `shuffle_groups` row groups that follow its own: about that many are in use at any time, and
    each is read once an epoch. A bucket of no more row groups is shuffled as a whole.

    Args:
        buckets: positions of the clips of each bucket.
        global_batch: clips of a batch, over all workers.
        seed: of every shuffle.
        groups: number of the row group of each position; default: all clips are shuffled.
        shuffle_groups: row groups of a bucket that are in use at a time.
    """

    def __init__(
        self,
        buckets: Mapping[str, Positions],
        global_batch: int,
        seed: int,
        groups: NDArray[np.int64] | None = None,
        shuffle_groups: int = 1,
    ) -> None:
        self.buckets = {name: np.asarray(buckets[name]) for name in sorted(buckets)}
        self.global_batch = global_batch
        self.seed = seed
        self.groups = groups
        self.shuffle_groups = shuffle_groups
        self._plan = lru_cache(maxsize=4)(self._plan_epoch)
        self._permutation = lru_cache(maxsize=4 * len(buckets))(self._permute)
        self._ends = [0]

    def __reduce__(self) -> tuple[type[BatchOrder], tuple[Any, ...]]:
        """Travel to another process as what it was made of."""
        made_of = (self.buckets, self.global_batch, self.seed, self.groups, self.shuffle_groups)
        return BatchOrder, made_of

    def batch(self, step: int) -> list[int]:
        """Positions of the clips in global batch `step`."""
        epoch = self.epoch(step)
        name, number = self._plan(epoch)[step - self._ends[epoch]]
        clips = self.buckets[name]
        positions = range(number * self.global_batch, (number + 1) * self.global_batch)
        return [
            int(clips[self._permutation(name, place // len(clips))[place % len(clips)]])
            for place in positions
        ]

    def epoch(self, step: int) -> int:
        """The epoch that global batch `step` belongs to."""
        while self._ends[-1] <= step:
            self._ends.append(self._ends[-1] + len(self._plan(len(self._ends) - 1)))
        return int(np.searchsorted(self._ends, step, side="right")) - 1

    def _plan_epoch(self, epoch: int) -> list[tuple[str, int]]:
        """(bucket, batch number within the bucket) of every global batch of an epoch."""
        numbers = {
            name: range(
                epoch * len(clips) // self.global_batch,
                (epoch + 1) * len(clips) // self.global_batch,
            )
            for name, clips in self.buckets.items()
        }
        # Buckets take turns at random; the batches of one stay in order, or row groups would not.
        turns = np.repeat(list(numbers), [len(batches) for batches in numbers.values()])
        np.random.default_rng([self.seed, epoch]).shuffle(turns)
        following = {name: iter(batches) for name, batches in numbers.items()}
        return [(str(name), next(following[name])) for name in turns]

    def _permute(self, name: str, epoch: int) -> NDArray[np.int64]:
        key = zlib.crc32(name.encode())
        generator = np.random.default_rng([self.seed, key, epoch])
        clips = self.buckets[name]
        order = generator.permutation(len(clips))
        if self.groups is None:
            return order
        numbers, group = np.unique(self.groups[clips], return_inverse=True)
        if len(numbers) <= self.shuffle_groups:
            return order
        turn = generator.permutation(len(numbers))[group]
        return np.argsort(turn + self.shuffle_groups * generator.random(len(clips)))


def sample_generator(seed: int, step: int, index: int, purpose: str) -> torch.Generator:
    """Generator of one sample's draws: a pure function of its place in the run."""
    entropy = [seed, step, index, zlib.crc32(purpose.encode())]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
