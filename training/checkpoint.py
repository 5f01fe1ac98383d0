"""Saved states of a run: complete or absent, newest first.

checkpoints/step-00000500/
  deepspeed/           DeepSpeed's own state, all ranks
  ema-rank00000.pt     averaged weights, per rank
  complete.json        written last: step, samples seen, world size, run id
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streamdit.errors import UserError
from training.ema import ExponentialMovingAverage
from training.engine import World

MARKER = "complete.json"


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint is, readable without loading it."""

    step: int
    samples: int
    world_size: int
    zero_stage: int
    fingerprint: str
    run_id: str | None


def checkpoint_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:08d}"


def find_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((marker.parent for marker in root.glob(f"step-*/{MARKER}")), reverse=True)


def read_facts(folder: Path) -> CheckpointFacts:
    """Facts of a complete checkpoint."""
    return CheckpointFacts(**json.loads((folder / MARKER).read_text()))


def save_checkpoint(
    root: Path,
    engine: Any,
    ema: ExponentialMovingAverage,
    facts: CheckpointFacts,
    world: World,
    keep: int,
) -> Path:
    """Save the state of all ranks; every rank calls this."""
    folder = checkpoint_folder(root, facts.step)
    if world.is_main:
        (folder / MARKER).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag="deepspeed", client_state={"step": facts.step})
    torch.save(ema.state_dict(), folder / f"ema-rank{world.rank:05d}.pt")
    dist.barrier()
    if world.is_main:
        staging = folder / f"{MARKER}.tmp"
        staging.write_text(json.dumps(asdict(facts), indent=2) + "\n")
        staging.replace(folder / MARKER)
        for old in find_checkpoints(root)[keep:]:
            (old / MARKER).unlink()
            shutil.rmtree(old)
    dist.barrier()
    return folder


def load_checkpoint(
    root: Path,
    engine: Any,
    ema: ExponentialMovingAverage,
    world: World,
    zero_stage: int,
    fingerprint: str,
) -> CheckpointFacts | None:
    """Load the newest complete checkpoint, if there is one; every rank calls this.

    Raises:
        UserError: if it was made with another configuration, ZeRO stage or number of workers.
    """
    found = find_checkpoints(root)
    if not found:
        return None
    folder = found[0]
    facts = read_facts(folder)
    if facts.fingerprint != fingerprint:
        raise UserError(
            f"{folder} was made with another configuration or data set; use another --out, or "
            f"remove {root} to begin again"
        )
    if (facts.world_size, facts.zero_stage) != (world.size, zero_stage):
        raise UserError(
            f"{folder} was made by {facts.world_size} workers at ZeRO stage {facts.zero_stage}, "
            f"this run has {world.size} at stage {zero_stage}; resume with the same numbers"
        )
    engine.load_checkpoint(str(folder), tag="deepspeed")
    state = torch.load(
        folder / f"ema-rank{world.rank:05d}.pt", map_location="cpu", weights_only=True
    )
    ema.load_state_dict(state)
    return facts
