"""What goes wrong inside a step: losses that are not finite, and memory that runs out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from streamdit.errors import UserError
from streamdit.model import StreamDiT
from streamdit.model.memory import recomputed_blocks
from training.config import RunConfig
from training.data import Batch
from training.engine import World
from training.metrics import peak_memory_bytes


class SkippedSteps:
    """Counts steps without an update because a loss or gradient was not finite.

    DeepSpeed looks at the gradients of all ranks and skips the update on all of them; this keeps
    what is needed to find the cause, and ends a run that cannot recover.

    Args:
        folder: where the clip ids of such steps are written.
        limit: steps in a row after which the run stops.
        world: this process.
        count: such steps before the one that the run continues from.
        in_a_row: those of them that came last.
        can_be_parent: whether another run can start from what this one makes.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        world: World,
        count: int = 0,
        in_a_row: int = 0,
        can_be_parent: bool = True,
    ) -> None:
        self.folder = folder
        self.limit = limit
        self.world = world
        self.count = count
        self.in_a_row = in_a_row
        self.start_again = (
            "export the newest checkpoint (streamdit export) and start from it with --from and a "
            "new --out"
            if can_be_parent
            else "begin with a new --out"
        )

    def note(
        self, step: int, skipped: bool, batches: Sequence[Batch], losses: Sequence[torch.Tensor]
    ) -> None:
        """Take in how a step went; every rank calls this with the same `skipped`.

        Raises:
            UserError: after `limit` skipped steps in a row.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.count += 1
        self.in_a_row += 1
        path = self._save(step, batches, losses)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"loss or gradients were not finite for {self.in_a_row} steps in a row, up to "
                f"step {step}; the clips are listed in {path.parent}; the same command with a "
                f"larger skip_limit goes on past them, or {self.start_again}, with a lower "
                "optimizer.learning_rate or without those clips"
            )

    def _save(self, step: int, batches: Sequence[Batch], losses: Sequence[torch.Tensor]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}-rank{self.world.rank:05d}.json"
        rows = [
            {"loss": str(float(loss)), "clip_ids": batch.clip_ids}
            for batch, loss in zip(batches, losses, strict=True)
        ]
        path.write_text(json.dumps({"step": step, "micro_batches": rows}, indent=2) + "\n")
        return path


VALIDATING, READING, SAVING = "in validation", "reading", "saving"
"""Where memory ran out, as :func:`memory_errors` is told."""


@contextmanager
def memory_errors(
    config: RunConfig,
    model: StreamDiT,
    batches: Sequence[Batch],
    world: World,
    where: str = "before the first step",
) -> Iterator[None]:
    """Turn running out of memory into one line with the sizes and what to lower.

    Args:
        config: settings, of which some are named as remedies.
        model: the student.
        batches: micro-batches of the step within; none where it is something else.
        world: this process.
        where: what is within, if it is no step.

    Raises:
        UserError: if memory ran out within.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedies, size = [], ""
        if batches:
            latents = batches[0].latents
            share = config.global_batch // world.size
            smaller = [size for size in range(1, len(latents)) if share % size == 0]
            if smaller:
                remedies.append(f"micro_batch={smaller[-1]}")
            depth = model.config.depth
            if recomputed_blocks(config.activation_checkpointing, depth) < depth:
                remedies.append("activation_checkpointing=true")
            shape = "x".join(str(length) for length in latents.shape[1:])
            size = f"micro-batch of {len(latents)} latents {shape}, "
        elif where == VALIDATING:
            settings = {"videos": config.validation.videos, "samples": config.validation.samples}
            remedies += [f"validation.{name}=0" for name, count in settings.items() if count]
        if where == READING:
            remedies += ["a smaller data.cache_mb", "fewer data.processes"]
        else:
            if config.zero_stage < (2 if config.compile_blocks else 3):
                remedies.append(f"zero_stage={config.zero_stage + 1}")
            if not config.offload_optimizer:
                remedies.append("offload_optimizer=true")
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        during = "" if batches else f"{where} "
        raise UserError(
            f"out of memory {during}on rank {world.rank} ({world.device}): "
            f"{parameters / 1e6:,.0f}M "
            f"parameters over {world.size} workers at ZeRO stage {config.zero_stage}, {size}"
            f"{peak_memory_bytes(world.device) / 2**30:.1f} GiB used at most; try "
            f"{' or '.join(remedies) or 'more workers'}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator said so: PyTorch's for CPUs, CUDA and cuBLAS raise plain errors."""
    said = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    allocators = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return allocators or any(part in str(error) for part in said)
