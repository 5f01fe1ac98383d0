"""Figures of a step, added up over its micro-batches and over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from training.engine import World
from training.objective import Mean, Metrics


class Means:
    """Weighted means under way; they stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Add the figures of a micro-batch."""
        for name, metric in metrics.items():
            if isinstance(metric, Mean):
                pair = torch.stack([metric.total.double(), metric.weight.double()])
            else:
                value = metric.detach().double()
                pair = torch.stack([value, torch.ones_like(value)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self, world: World) -> dict[str, float]:
        """Means over all ranks, without those that nothing contributed to; every rank calls this.

        Ranks may have met different names.
        """
        mine = {}
        if self._sums:
            values = torch.stack(list(self._sums.values())).tolist()
            mine = dict(zip(self._sums, values, strict=True))
        totals: dict[str, list[float]] = {}
        for part in world.gather(mine):
            for name, (total, weight) in part.items():
                sums = totals.setdefault(name, [0.0, 0.0])
                sums[0] += total
                sums[1] += weight
        return {name: total / weight for name, (total, weight) in totals.items() if weight}
