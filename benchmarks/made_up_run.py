"""A run of the trainer on random latents, for benchmarks of what goes on inside one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from made_up_latents import make_dataset

from jobs.config import load_config
from streamdit.model import build_dit
from training.config import TrainConfig
from training.data import LatentDataset
from training.ema import ExponentialMovingAverage
from training.engine import World, build_engine
from training.job import TrainJob
from training.objective import make_flow_matching
from training.run import Run

R = TypeVar("R", bound=Run)

ONLY_STEPS = ("validation.samples=0", "checkpoint.every=1000000")


def make_job(world: World, preset: str, overrides: Sequence[str]) -> TrainJob:
    """A job with a preset's model on 64 random clips, in a temporary folder of all workers."""
    folders: list[Any] = [tempfile.mkdtemp() if world.is_main else None]
    dist.broadcast_object_list(folders, group=world.control)
    folder = Path(folders[0])
    config = load_config(
        TrainConfig,
        stage="train",
        preset=preset,
        overrides=[*ONLY_STEPS, f"tracking.directory={folder / 'mlflow'}", *overrides],
    )
    torch.set_num_threads(config.launch.cpus_per_worker)
    if world.is_main:
        make_dataset(folder / "dataset", config.model, clips=64)
    world.barrier()
    return TrainJob(
        config,
        config.model,
        config.partition,
        config.sampling,
        str(folder / "dataset"),
        str(folder / "run"),
        make_flow_matching,
    )


def make_run(kind: type[R], job: TrainJob, world: World) -> R:
    """The run of a job, as the trainer sets it up."""
    config = job.config
    model = build_dit(job.model, config.seed).to(world.device)
    model.activation_checkpointing = config.activation_checkpointing
    model.compile_blocks = config.compile_blocks
    engine = build_engine(model, config, world)
    average = ExponentialMovingAverage(engine, config.ema_decay)
    objective = make_flow_matching(job, world.device)
    return kind(job, world, engine, average, objective, LatentDataset(job.dataset, "train"))
