"""One training loop for every objective and every launcher.

`train_loop(job)` runs alike in a Ray Train worker, under torchrun or Slurm, and in a plain process.
It knows DeepSpeed, checkpoints and logging, but neither flow matching nor distillation.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streamdit.config import StreamDiTConfig
from streamdit.errors import UserError
from streamdit.io import load_model, save_model_directory
from streamdit.model import StreamDiT, build_dit
from streamdit.model.flops import count_flops
from training.checkpoint import CheckpointFacts, load_checkpoint, save_checkpoint
from training.data import Batch, BatchLoader, BatchOrder, LatentDataset, sample_generator
from training.ema import ExponentialMovingAverage, gather_float32
from training.engine import World, build_engine, join_world, set_learning_rate
from training.job import TrainJob
from training.metrics import MetricsFile, StepMeter
from training.objective import Objective, stack_draws
from training.schedule import learning_rate
from training.tracking import Tracker
from training.validation import validate


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


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
    dataset.check_fits(model.config)
    if start_config is not None:
        dataset.check_continues(start_config)
    model.activation_checkpointing = config.activation_checkpointing
    objective = job.make_objective(job, world.device)
    engine = build_engine(model.to(world.device), config, world)
    ema = ExponentialMovingAverage(engine, config.ema_decay)
    run = _Run(job, world, engine, ema, objective, dataset)
    run.resume()
    try:
        with _StopRequest() as stop:
            run.train(stop)
        run.export(start_config)
    except Interrupted:
        run.close("KILLED")
        raise
    except BaseException:
        run.close("FAILED")
        raise
    else:
        run.close("FINISHED")
    finally:
        world.leave()


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


class _StopRequest:
    """Remembers a SIGTERM, so that the loop can save its state and stop."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _StopRequest:
        try:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread (a Ray Train worker): Ray stops it itself
            self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, signum: int, frame: Any) -> None:
        self.requested = True

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        flag = torch.tensor([int(self.requested)], device=world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


class _Run:
    """State of a run between resume and export."""

    def __init__(
        self,
        job: TrainJob,
        world: World,
        engine: Any,
        ema: ExponentialMovingAverage,
        objective: Objective,
        dataset: LatentDataset,
    ) -> None:
        self.job, self.config, self.world = job, job.config, world
        self.engine, self.ema, self.objective = engine, ema, objective
        config = self.config
        self.frames = job.model.buffer_frames
        micro_batch, _ = config.accumulation(world.size)
        self.dataset = dataset
        self.held_out = LatentDataset(job.dataset, "held_out")
        if len(self.held_out):
            self.held_out.check_fits(job.model)
        order = BatchOrder(dataset.buckets, config.global_batch, config.seed)
        self.loader = self._loader(dataset, order, micro_batch)
        self.held_out_loader = self._loader(self.held_out, order, 1)
        self.step = 0
        self.tracker: Tracker | None = None
        self.metrics: MetricsFile | None = None
        self.fingerprint = job.fingerprint()

    def _loader(self, dataset: LatentDataset, order: BatchOrder, micro: int) -> BatchLoader:
        return BatchLoader(dataset, order, self.frames, self.world.rank, self.world.size, micro)

    @property
    def checkpoints(self) -> Path:
        return Path(self.job.out) / "checkpoints"

    def resume(self) -> None:
        """Load the newest checkpoint, if any, and open the records."""
        facts = load_checkpoint(
            self.checkpoints,
            self.engine,
            self.ema,
            self.world,
            self.config.zero_stage,
            self.fingerprint,
        )
        self.step = facts.step if facts else 0
        if self.world.is_main:
            self.metrics = MetricsFile(self.job.metrics_path, self.step)
            self.tracker = Tracker.start(
                self.config.tracking,
                self.job.run_name,
                params=self._parameters(),
                tags={
                    "dataset": self.job.dataset,
                    "dataset_fingerprint": self.dataset.manifest.fingerprint,
                    "fingerprint": self.fingerprint,
                    **self.job.tags,
                },
                run_id=facts.run_id if facts else None,
            )

    def _parameters(self) -> dict[str, Any]:
        job = self.job
        shape = {"model": job.model, "partition": job.partition, "sampling": job.sampling}
        return self.config.model_dump(mode="json") | {
            name: part.model_dump(mode="json") for name, part in shape.items()
        }

    def train(self, stop: _StopRequest) -> None:
        """Steps from the current one to the last."""
        config = self.config
        meter = self._meter()
        waiting = time.perf_counter()
        for batches in self.loader.steps(self.step, config.steps):
            started = time.perf_counter()
            waited = started - waiting
            figures = self._step(batches)
            waiting = time.perf_counter()
            meter.add(waiting - started + waited, waited)
            last = self.step == config.steps
            if last or self.step % config.log_every == 0 or self.step == 1:
                self._log(figures, meter)
            if config.validation.samples and (last or self.step % config.validation.every == 0):
                self._validate()
            stopping = stop.agreed(self.world)
            if last or stopping or self.step % config.checkpoint.every == 0:
                self._save()
            if stopping and not last:
                raise Interrupted(f"stopped at step {self.step}; the same command continues")
            waiting = time.perf_counter()

    def _step(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        """One optimizer step over its micro-batches; its figures stay on the device."""
        config, device = self.config, self.world.device
        set_learning_rate(self.engine, learning_rate(config.optimizer, self.step, config.steps))
        sums: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            draws = stack_draws(
                [
                    self.objective.draw(
                        batch.latents.shape[1:],
                        sample_generator(config.seed, self.step, index, "draws"),
                    )
                    for index in batch.sample_indices
                ]
            )
            loss, metrics = self.objective(
                self.engine,
                batch.to(device),
                {name: value.to(device) for name, value in draws.items()},
            )
            self.engine.backward(loss)
            self.engine.step()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums.setdefault(name, []).append(value)
        self.ema.update()
        self.step += 1
        return {name: torch.stack(values).mean() for name, values in sums.items()}

    def _meter(self) -> StepMeter:
        model = self.job.model
        frames, rows, columns = model.token_grid(model.buckets[0])
        return StepMeter(
            forward_flops=count_flops(model)["total"],
            tokens=frames * rows * columns,
            samples=self.config.global_batch // self.world.size,
            world_size=self.world.size,
            device=self.world.device,
            recompute=self.config.activation_checkpointing,
        )

    def _log(self, step: dict[str, torch.Tensor], meter: StepMeter) -> None:
        """Fetch the last step's figures, the loss as the mean of all ranks, and record them."""
        config = self.config
        loss = step["loss"].double()
        dist.all_reduce(loss)
        figures = {name: float(value) for name, value in step.items()} | {
            "loss": float(loss / self.world.size),
            "learning_rate": learning_rate(config.optimizer, self.step - 1, config.steps),
            "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
            **meter.flush(config.steps - self.step),
        }
        if self.metrics is None or self.tracker is None:
            return
        epoch = self.loader.order.epoch(self.step - 1)
        self.metrics.write({"step": self.step, "epoch": epoch, **figures})
        self.tracker.log(self.step, {"epoch": epoch, **figures})

    def _validate(self) -> None:
        if not len(self.held_out):
            return
        self.engine.eval()
        loss = validate(
            self.engine,
            self.objective,
            self.held_out,
            self.held_out_loader,
            self.config.validation.samples,
            self.world,
        )
        self.engine.train()
        if self.metrics is not None and self.tracker is not None:
            self.metrics.write({"step": self.step, "validation_loss": loss})
            self.tracker.log(self.step, {"validation_loss": loss})

    def _save(self) -> None:
        facts = CheckpointFacts(
            step=self.step,
            samples=self.step * self.config.global_batch,
            world_size=self.world.size,
            zero_stage=self.config.zero_stage,
            fingerprint=self.fingerprint,
            run_id=self.tracker.run_id if self.tracker else None,
        )
        folder = save_checkpoint(
            self.checkpoints,
            self.engine,
            self.ema,
            facts,
            self.world,
            self.config.checkpoint.keep,
        )
        if self.tracker is not None:
            self.tracker.tag("checkpoint", str(folder))

    def export(self, start_config: StreamDiTConfig | None) -> None:
        """Write the averaged weights as a model directory and hand it to MLflow."""
        if self.config.ema_decay:
            with self.ema.swapped_in():
                weights = gather_float32(self.engine)
        else:
            weights = gather_float32(self.engine)
        if not self.world.is_main:
            return
        assert self.tracker is not None
        manifest = self.dataset.manifest
        lineage = {
            "fingerprint": self.fingerprint,
            "dataset_fingerprint": manifest.fingerprint,
            "run_id": self.tracker.run_id,
            "step": self.step,
            "parent": start_config.weights_sha256 if start_config else None,
        }
        config = StreamDiTConfig(
            model=self.job.model,
            partition=self.job.partition,
            sampling=self.job.sampling,
            autoencoder=manifest.autoencoder,
            text_encoders=manifest.text_encoders,
            fps=manifest.buckets[0].fps,
            lineage=lineage,
        )
        save_model_directory(self.job.model_directory, config, weights, self.job.dataset)
        self.tracker.artifact(self.job.model_directory, "model")

    def close(self, status: str) -> None:
        """Close the records."""
        if self.metrics is not None:
            self.metrics.close()
        if self.tracker is not None:
            self.tracker.finish(status)
