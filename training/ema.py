"""Averaged weights, one shard per rank, following DeepSpeed's own float32 partition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from training.partitions import master_partitions, publish_masters


class ExponentialMovingAverage:
    """Exponential moving average of the master weights.

    Early in training the decay is lower, `(1 + n) / (10 + n)` after n updates, so that the random
    start does not linger.

    Args:
        engine: DeepSpeed engine.
        decay: weight of the past at each update; 0 averages nothing and keeps nothing.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.updates = 0
        masters = master_partitions(engine) if decay else []
        self.shards = [partition.clone() for partition in masters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more optimizer step."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for shard, weights in zip(self.shards, master_partitions(self.engine), strict=True):
            shard.lerp_(weights.to(shard.device), 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shards."""
        return {"updates": self.updates, "shards": self.shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's shards."""
        if not self.decay:
            return
        self.updates = state["updates"]
        for shard, saved in zip(self.shards, state["shards"], strict=True):
            shard.copy_(saved)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the master weights are the averaged ones."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @contextmanager
    def model_averaged(self) -> Iterator[None]:
        """Within the context the model computes with the averaged weights; on all ranks."""
        with self.swapped_in():
            publish_masters(self.engine)
            yield
        # Not after an error, which other ranks may not have had: they would not be here.
        publish_masters(self.engine)

    @torch.no_grad()
    def _swap(self) -> None:
        for shard, weights in zip(self.shards, master_partitions(self.engine), strict=True):
            kept = weights.clone()
            weights.copy_(shard)
            shard.copy_(kept)
