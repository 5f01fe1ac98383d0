"""One training loop for every objective and every launcher.

`train_loop(job)` runs alike in a Ray Train worker, under torchrun or Slurm, and in a plain process.
It knows DeepSpeed, checkpoints and logging, but neither flow matching nor distillation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from streamdit.config import StreamDiTConfig
from streamdit.errors import UserError
from streamdit.io import load_model
from streamdit.model import StreamDiT, build_dit
from training.data import LatentDataset
from training.ema import ExponentialMovingAverage
from training.engine import build_engine, join_world, release_engines
from training.export import export_adapter, export_checkpoint, write_record
from training.failures import memory_errors
from training.job import TrainJob
from training.loader import allow_open_files
from training.lora import add_adapters
from training.records import known_run, outbox_path
from training.run import Run
from training.stop import Interrupted, StopRequest
from training.system import system_metrics


def train_loop(job: TrainJob) -> None:
    """Train until the last step, from wherever the newest checkpoint left off.

    Raises:
        UserError: if data set, model and configuration do not fit each other.
        Interrupted: after SIGTERM, once a checkpoint is written.
    """
    allow_open_files()
    try:
        _train(job)
    finally:
        release_engines()


def _train(job: TrainJob) -> None:
    config = job.config
    torch.set_num_threads(config.launch.cpus_per_worker)
    world = join_world()
    config.accumulation(world.size)
    torch.manual_seed(config.seed)
    dataset = LatentDataset(job.dataset, "train", int(config.data.cache_mb * 2**20))
    model, start_config = _starting_model(job)
    dataset.check_files(world.rank, world.size)
    dataset.check_fits(model.config, config.autoencoder)
    if start_config is not None:
        dataset.check_continues(start_config)
    model.activation_checkpointing = config.activation_checkpointing
    model.compile_blocks = config.compile_blocks
    with memory_errors(config, model, (), world):
        objective = job.make_objective(job, world.device)
        engine = build_engine(model.to(world.device), config, world)
        ema = ExponentialMovingAverage(engine, config.ema_decay)
        run = Run(job, world, engine, ema, objective, dataset)
    if world.is_main:
        write_record(job, dataset.manifest)
    try:
        watched = system_metrics(
            config.tracking,
            world,
            run.records.run_id,
            partial(outbox_path, job),
            lambda: run.step,
            lambda: known_run(job).run_id,
        )
        # To the end, since an export that is cut off would have to be made again.
        with StopRequest(world) as stop:
            with watched:
                run.train(stop)
            export(run)
    except Interrupted:
        run.records.close("KILLED")
        raise
    except BaseException:
        run.records.close("FAILED")
        raise
    else:
        run.records.close("FINISHED")


def _starting_model(job: TrainJob) -> tuple[StreamDiT, StreamDiTConfig | None]:
    """Random weights, or those of the parent model directory."""
    if job.parent is None:
        return build_dit(job.model, job.config.seed), None
    model, parent = load_model(job.parent, dtype=torch.float32)
    if parent.model != job.model:
        raise UserError(
            f"{job.parent} holds a model of another shape than the configuration's `model`; use "
            "the configuration that it was trained with, or start without it"
        )
    if job.config.lora is not None:
        add_adapters(model, job.config.lora)
    return model, parent


def export(run: Run) -> None:
    """Write model directories of the last checkpoint and hand them to MLflow; the main rank does.

    `model` has the averaged weights and comes last, since it says that the run is finished;
    `model-raw` has those of the last step; `adapter` what a fine-tuning adds to its parent.
    """
    if not run.world.is_main:
        return
    job, out = run.job, Path(run.job.out)
    if job.config.lora is not None:
        export_adapter(out, out / "adapter")
        run.records.artifact(out / "adapter", "adapter")
    if job.config.ema_decay:
        export_checkpoint(out, out / "model-raw", run.step, "raw")
    export_checkpoint(out, job.model_directory, run.step)
    run.records.artifact(job.model_directory, "model")
    run.records.tag("model", str(job.model_directory))
