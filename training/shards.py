"""Tensors of a saved state by parameter name, whatever number of workers saved it.

What a rank saved is flat; beside it lies which stretch of which parameter it is. From that, any
stretch of any parameter is put together again: for another number of workers, another ZeRO stage,
or an export. (DeepSpeed's universal checkpoint does it for its own tensors only, which leaves the
averaged weights behind, and writes the whole state a second time.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from training.ema import ExponentialMovingAverage
from training.partitions import Fragment, adam_state, fragments, master_partitions, publish_masters

Kind = Literal["weights", "exp_avg", "exp_avg_sq", "average"]
"""Float32 weights, Adam's two moments, and the averaged weights."""


def average_file(folder: Path, rank: int) -> Path:
    """Where a rank keeps its averaged weights and the layout of all it holds."""
    return folder / f"ema-rank{rank:05d}.pt"


def files_with(kind: Kind, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files, by path within it, that hold tensors of `kind`."""
    # The averaged weights' files also say where every parameter lies.
    endings = ("ema-rank*.pt",) if kind == "average" else ("ema-rank*.pt", "*_optim_states.pt")
    return [name for name in names if any(fnmatch(name, ending) for ending in endings)]


def save_average(folder: Path, ema: ExponentialMovingAverage) -> None:
    """Save this rank's averaged weights with their layout."""
    held = [asdict(fragment) for fragment in fragments(ema.engine)]
    torch.save(ema.state_dict() | {"fragments": held}, average_file(folder, ema.engine.global_rank))


class SavedShards:
    """All ranks' shards of a checkpoint folder, read as needed (memory-mapped).

    Args:
        folder: a complete checkpoint.
        world_size: ranks that saved it.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        self._where: dict[str, list[tuple[int, Fragment]]] = {}
        self._averages = lru_cache(maxsize=None)(self._load_average)
        self._states = lru_cache(maxsize=None)(self._load_state)
        for rank in range(world_size):
            for values in self._averages(rank)["fragments"]:
                fragment = Fragment(**values)
                self._where.setdefault(fragment.name, []).append((rank, fragment))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every saved parameter, by name."""
        return {name: tuple(places[0][1].shape) for name, places in self._where.items()}

    @property
    def updates(self) -> int:
        """Updates that the average has seen."""
        return int(self._averages(0)["updates"])

    @property
    def adam_steps(self) -> int:
        """Updates that Adam has made."""
        return int(self._states(0)["adam"][0]["step"])

    def read(self, kind: Kind, name: str, start: int, numel: int) -> Tensor:
        """Elements `start ... start + numel - 1` of a flattened parameter, float32 `[numel]`."""
        out = torch.empty(numel)
        copied = 0
        for rank, held in self._where[name]:
            low = max(start, held.start)
            high = min(start + numel, held.start + held.numel)
            if low < high:
                place = held.offset + low - held.start
                flat = self._flat(rank, kind, held.group)
                out[low - start : high - start] = flat[place : place + high - low]
                copied += high - low
        assert copied == numel, f"{self.folder}: {name} is incomplete ({copied} of {numel})"
        return out

    def tensor(self, kind: Kind, name: str) -> Tensor:
        """A whole parameter in its shape, float32."""
        shape = torch.Size(self.shapes[name])
        return self.read(kind, name, 0, shape.numel()).reshape(shape)

    def close(self) -> None:
        """Let go of the mapped files."""
        self._averages.cache_clear()
        self._states.cache_clear()

    def _flat(self, rank: int, kind: Kind, group: int) -> Tensor:
        if kind == "average":
            shard: Tensor = self._averages(rank)["shards"][group]
            return shard
        state = self._states(rank)
        flat: Tensor = state["weights"][group] if kind == "weights" else state["adam"][group][kind]
        return flat

    def _load_average(self, rank: int) -> dict[str, Any]:
        path = average_file(self.folder, rank)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state

    def _load_state(self, rank: int) -> dict[str, Any]:
        """Weights and moments from DeepSpeed's file, which differs between stages 1, 2 and 3."""
        (path,) = (self.folder / "deepspeed").glob(
            f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt"
        )
        # DeepSpeed pickles its own classes into the file.
        saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        state = saved["optimizer_state_dict"]
        if "fp32_flat_groups" in state:
            return {
                "weights": state["fp32_flat_groups"],
                "adam": state["optimizer_state_dict"]["state"],
            }
        return {
            "weights": state["single_partition_of_fp32_groups"],
            "adam": state["base_optimizer_state"]["state"],
        }


@torch.no_grad()
def load_resharded(shards: SavedShards, engine: Any, ema: ExponentialMovingAverage) -> None:
    """Give every rank its stretches of a state that other workers saved; every rank calls this."""
    masters, moments = master_partitions(engine), adam_state(engine, shards.adam_steps)
    targets: dict[Kind, Sequence[Tensor]] = {
        "weights": masters,
        "exp_avg": [state["exp_avg"] for state in moments],
        "exp_avg_sq": [state["exp_avg_sq"] for state in moments],
    }
    if ema.decay:
        targets["average"] = ema.shards
    for held in fragments(engine):
        for kind, flats in targets.items():
            place = flats[held.group][held.offset : held.offset + held.numel]
            place.copy_(shards.read(kind, held.name, held.start, held.numel))
    ema.updates = shards.updates
    publish_masters(engine)
