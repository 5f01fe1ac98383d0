"""One training loop for every objective and every launcher.

`train_loop(job)` runs alike in a Ray Train worker, under torchrun or Slurm, and in a plain process.
It knows DeepSpeed, checkpoints and logging, but neither flow matching nor distillation.
"""

from __future__ import annotations

import torch

from streamdit.config import StreamDiTConfig
from streamdit.errors import UserError
from streamdit.io import load_model, save_model_directory
from streamdit.model import StreamDiT, build_dit
from training.data import LatentDataset
from training.ema import ExponentialMovingAverage, gather_float32
from training.engine import build_engine, join_world
from training.job import TrainJob
from training.run import Run
from training.stop import Interrupted, StopRequest


def train_loop(job: TrainJob) -> None:
    """Train until the last step, from wherever the newest checkpoint left off.

    Raises:
        UserError: if data set, model and configuration do not fit each other.
        Interrupted: after SIGTERM, once a checkpoint is written.
    """
    config = job.config
    torch.set_num_threads(config.launch.cpus_per_worker)
    world = join_world()
    config.accumulation(world.size)
    torch.manual_seed(config.seed)
    dataset = LatentDataset(job.dataset, "train")
    model, start_config = _starting_model(job)
    dataset.check_fits(model.config, config.autoencoder)
    if start_config is not None:
        dataset.check_continues(start_config)
    model.activation_checkpointing = config.activation_checkpointing
    objective = job.make_objective(job, world.device)
    engine = build_engine(model.to(world.device), config, world)
    ema = ExponentialMovingAverage(engine, config.ema_decay)
    run = Run(job, world, engine, ema, objective, dataset)
    try:
        with StopRequest(world) as stop:
            run.train(stop)
        export(run, start_config)
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
    return model, parent


def export(run: Run, start_config: StreamDiTConfig | None) -> None:
    """Write the averaged weights as a model directory and hand it to MLflow."""
    job = run.job
    if job.config.ema_decay:
        with run.ema.swapped_in():
            weights = gather_float32(run.engine)
    else:
        weights = gather_float32(run.engine)
    if not run.world.is_main:
        return
    manifest = run.dataset.manifest
    lineage = {
        "fingerprint": run.fingerprint,
        "dataset_fingerprint": manifest.fingerprint,
        "run_id": run.records.run_id,
        "step": run.step,
        "parent": start_config.weights_sha256 if start_config else None,
    }
    config = StreamDiTConfig(
        model=job.model,
        partition=job.partition,
        sampling=job.sampling,
        distilled=job.distilled,
        autoencoder=manifest.autoencoder,
        text_encoders=manifest.text_encoders,
        fps=manifest.buckets[0].fps,
        lineage=lineage,
    )
    save_model_directory(job.model_directory, config, weights, job.dataset)
    run.records.artifact(job.model_directory, "model")
