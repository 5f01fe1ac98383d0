"""Saved states of a run: complete or absent, newest first.

checkpoints/step-00000500/
  deepspeed/           DeepSpeed's own state, all ranks
  ema-rank00000.pt     averaged weights, and which parts of which parameters each rank holds
  complete.json        written last: step, samples seen, world size, run id, size and hash of files
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from streamdit.errors import UserError
from streamdit.files import replace_text
from streamdit.hashing import file_sha256
from training.config import CheckpointConfig
from training.ema import ExponentialMovingAverage
from training.engine import World
from training.job import TrainJob, difference
from training.shards import SavedShards, average_file, load_resharded, save_average

logger = logging.getLogger(__name__)

MARKER = "complete.json"
PREFIX = "step-"
NFS_WAIT_S = 90.0
"""Longer than a client of NFS, as it comes, takes what it knows of a folder for true."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint is, readable without loading it.

    Attributes:
        step: optimizer steps taken.
        samples: clips seen.
        world_size: workers that saved it.
        zero_stage: DeepSpeed's stage.
        fingerprint: the job's.
        run_id: MLflow run.
        skipped_steps: steps so far without an update, for a loss that was not finite.
        skipped_in_a_row: those of them that came last, without a good one in between.
        files: bytes and SHA-256 of every file, by its path within the checkpoint.
        settings: what the fingerprint is of.
    """

    step: int
    samples: int
    world_size: int
    zero_stage: int
    fingerprint: str
    run_id: str | None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def checkpoint_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Optimizer steps before a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix(PREFIX))


def find_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((marker.parent for marker in root.glob(f"{PREFIX}*/{MARKER}")), reverse=True)


def read_facts(folder: Path) -> CheckpointFacts:
    """Facts of a complete checkpoint."""
    return CheckpointFacts(**json.loads((folder / MARKER).read_text()))


def save_checkpoint(
    root: Path,
    engine: Any,
    ema: ExponentialMovingAverage,
    facts: CheckpointFacts,
    world: World,
    config: CheckpointConfig,
) -> Path:
    """Save the state of all ranks; every rank calls this."""
    folder = checkpoint_folder(root, facts.step)
    if world.is_main:
        _drop_unfinished(root)  # first: the disk may have no room beside them
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    world.barrier()
    # The second key lets DeepSpeed's own tools convert the state.
    client_state = {"step": facts.step, "universal_checkpoint_info": {}}
    engine.save_checkpoint(
        str(folder), tag="deepspeed", client_state=client_state, exclude_frozen_parameters=True
    )
    save_average(folder, ema)
    world.barrier()
    files = _seal(folder, world)
    if world.is_main:
        sealed = replace(facts, files=files)
        replace_text(folder / MARKER, json.dumps(asdict(sealed), indent=2) + "\n")
        _drop_old(root, facts.step, config)
    world.barrier()
    return folder


def _seal(folder: Path, world: World) -> dict[str, tuple[int, str]]:
    """Size and hash of every file of a checkpoint, the work shared out among the ranks."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    mine = {
        str(path.relative_to(folder)): (path.stat().st_size, file_sha256(path))
        for path in paths[world.rank :: world.size]
    }
    return {name: seal for part in world.gather(mine) for name, seal in part.items()}


def _drop_unfinished(root: Path) -> None:
    """Remove what was cut off while it was written."""
    for folder in root.glob(f"{PREFIX}*"):
        if not (folder / MARKER).is_file():
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; what cannot be removed now is tried again with the next one."""
    try:
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:  # on NFS, a file that somebody still reads
        logger.warning("%s cannot be removed yet (%s)", folder, error)


def _drop_old(root: Path, step: int, config: CheckpointConfig) -> None:
    """Keep the newest checkpoints and the milestones, of those up to `step`.

    Drops what never became complete, and all of later steps: a run that saves `step` found them
    damaged when it began, and makes them again.
    """
    found = [folder for folder in find_checkpoints(root) if step_of(folder) <= step]
    keep = set(found[: config.keep])
    if config.keep_every:
        keep |= {folder for folder in found if step_of(folder) % config.keep_every == 0}
    for folder in root.glob(f"{PREFIX}*"):
        if folder not in keep:
            _remove(folder)


def find_damage(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    """What is wrong with files of a checkpoint, by the size and hash that they had, or None."""
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if file_sha256(path) != sha256:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def _look_together(folder: Path, world: World) -> tuple[CheckpointFacts | None, str | None]:
    """Facts of a checkpoint, or what is wrong with it; every rank gets the same answer.

    The work is shared out among the ranks.
    """
    facts, damage = None, None
    try:
        facts = read_facts(folder)
        damage = find_damage(folder, dict(sorted(facts.files.items())[world.rank :: world.size]))
    except (ValueError, TypeError, OSError) as error:
        damage = f"{MARKER} cannot be read ({error})"
    damage = next((found for found in world.gather(damage) if found), None)
    return (None, damage) if damage else (facts, None)


def warn_of_damage(folder: Path, damage: str) -> None:
    """Say that a checkpoint is passed over."""
    logger.warning("%s is damaged (%s); trying the one before", folder, damage)


def _warn_of_unfinished(root: Path, complete: Sequence[str]) -> None:
    """Say that a newer checkpoint than the complete ones was never written to its end."""
    newest = complete[0] if complete else ""
    for folder in sorted(root.glob(f"{PREFIX}*"), reverse=True):
        if folder.name > newest and not (folder / MARKER).is_file():
            reason = f"it has no {MARKER}: it was not written to its end"
            if complete:
                warn_of_damage(folder, reason)
            else:
                logger.warning("%s cannot be used (%s); starting from step 0", folder, reason)


def require_shared_folder(root: Path, world: World) -> None:
    """Make sure that all workers write into one folder, before any of them has done any work.

    Raises:
        UserError: if some do not see what the first one writes there.
    """
    if world.size == 1:
        return
    mark = root / world.gather(f".shared-{uuid4().hex}")[0]
    if world.is_main:
        root.mkdir(parents=True, exist_ok=True)
        mark.touch()
    world.barrier()
    seen = world.gather(_appears(mark))
    if world.is_main:
        mark.unlink(missing_ok=True)
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise UserError(
            f"worker {blind} does not see what worker 0 writes into {root}; put --out on storage "
            "that all nodes share"
        )


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes to be seen: NFS shows what others do after a while."""
    until = time.monotonic() + NFS_WAIT_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(1.0)
        with suppress(OSError):
            os.listdir(path.parent)  # looks anew where a lookup remembers
    return True


def load_checkpoint(
    root: Path,
    engine: Any,
    ema: ExponentialMovingAverage,
    world: World,
    zero_stage: int,
    job: TrainJob,
) -> CheckpointFacts | None:
    """Load the newest undamaged checkpoint, if there is one; every rank calls this.

    With the number of workers and the ZeRO stage that saved it, the state is the same to the last
    bit; with others it is the same numbers, laid out anew.

    Raises:
        UserError: if it was made with another configuration, or ranks see different files.
    """
    require_shared_folder(root, world)
    names = world.gather([path.name for path in find_checkpoints(root)])[0]
    lacking = next((name for name in names if not _appears(root / name / MARKER)), None)
    if any(world.gather(lacking)):
        raise UserError(
            f"workers see different checkpoints in {root}; put --out on storage that all nodes "
            "share"
        )
    if world.is_main:
        _warn_of_unfinished(root, names)
    for name in names:
        folder = root / name
        facts, damage = _look_together(folder, world)
        if facts is None:
            if world.is_main:
                warn_of_damage(folder, str(damage))
            continue
        if facts.fingerprint != job.fingerprint():
            other = "another configuration or data set"
            if facts.settings:
                other = difference(facts.settings, job.identity())
            raise UserError(
                f"{folder} was made with {other}: what decides a run's numbers stays as it is; "
                f"restore that, use another --out, or remove {root} to begin again"
            )
        if (facts.world_size, facts.zero_stage) == (world.size, zero_stage):
            # Frozen parameters are not saved: the model directory to start from has them.
            engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
            path = average_file(folder, world.rank)
            ema.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            with closing(SavedShards(folder, facts.world_size)) as shards:
                load_resharded(shards, engine, ema)
        return facts
    if names and world.is_main:
        logger.warning("no checkpoint in %s can be used; starting from step 0", root)
    return None
