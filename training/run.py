"""The steps of a run, between the checkpoint it starts from and its last one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamdit.model.memory import recomputed_blocks
from training.checkpoint import CheckpointFacts, load_checkpoint, save_checkpoint
from training.data import Batch, LatentDataset
from training.ema import ExponentialMovingAverage
from training.engine import World, set_learning_rate, settle_optimizer
from training.failures import READING, SAVING, VALIDATING, SkippedSteps, memory_errors
from training.job import TrainJob
from training.loader import BatchLoader
from training.means import Means
from training.metrics import StepMeter, device_peak_flops, read_metrics
from training.objective import Draw, Figures, Mean, Objective
from training.order import BatchOrder
from training.records import Records
from training.samples import sample_videos
from training.schedule import learning_rate
from training.stop import Interrupted, StopRequest
from training.validation import validate


class MicroLoss(NamedTuple):
    """Loss of a micro-batch: on the device, of how many clips, and what else may be logged."""

    loss: Tensor
    clips: int
    figures: Figures


VIDEOS = "validation_videos"
"""Figure that tells that videos were made."""


class Run:
    """State of a run: the engine, where it stands, and its records.

    Args:
        job: what to train.
        world: this process.
        engine: DeepSpeed engine of the student.
        ema: its averaged weights.
        objective: what it is trained towards.
        dataset: clips to train on.
    """

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
        micro_batch, _ = config.accumulation(world.size)
        self.dataset = dataset
        self.held_out = LatentDataset(job.dataset, "held_out")
        if len(self.held_out):
            self.held_out.check_fits(job.model)
        order = BatchOrder(
            dataset.buckets,
            config.global_batch,
            config.seed,
            dataset.row_groups,
            dataset.groups_in(config.shuffle_mb),
        )
        self.loader = self._loader(dataset, order, micro_batch, objective.draw)
        self.held_out_loader = self._loader(self.held_out, order, 1)
        self.checkpoints = Path(job.out) / "checkpoints"
        # Now: the data set or the parent may be out of reach when state is saved.
        self.settings, self.fingerprint = job.identity(), job.fingerprint()
        facts = load_checkpoint(self.checkpoints, engine, ema, world, config.zero_stage, job)
        settle_optimizer(engine, config, world)
        self.step = self.saved_step = facts.step if facts else 0
        self.skipped = SkippedSteps(
            Path(job.out) / "skipped",
            config.skip_limit,
            world,
            facts.skipped_steps if facts else 0,
            facts.skipped_in_a_row if facts else 0,
            can_be_parent=job.distilled is None,
        )
        self.records = Records(
            job,
            dataset.manifest.fingerprint,
            self.step,
            facts.run_id if facts else None,
            keep=world.is_main,
        )

    def _loader(
        self, dataset: LatentDataset, order: BatchOrder, micro: int, draw: Draw | None = None
    ) -> BatchLoader:
        frames, world, config = self.job.model.buffer_frames, self.world, self.config
        return BatchLoader(
            dataset, order, frames, world.rank, world.size, micro, config.data, draw, config.steps
        )

    def train(self, stop: StopRequest) -> None:
        """Steps from the current one to the last.

        Raises:
            Interrupted: after a request to stop, once a checkpoint is written.
        """
        config = self.config
        meter = self._meter()
        if self._validation_was_cut_off():
            self._validate_unless_stopped(stop)
        waiting = time.perf_counter()
        for batches in self._batches():
            started = time.perf_counter()
            waited = started - waiting
            with memory_errors(config, self.engine.module, batches, self.world):
                losses, extra_forwards = self._train_step(batches, stop)
            waiting = time.perf_counter()
            meter.add(waiting - started + waited, waited, batches, extra_forwards)
            last = self.step == config.steps
            if self._due(config.log_every) or self.step == 1:
                self._log(losses, meter)
            stopping = stop.agreed() and not last
            # Nothing comes before the checkpoint: who asks to stop may not wait long, and a
            # validation that fails must not cost the steps before it.
            if stopping or self._due(config.checkpoint.every):
                self._save()
            if stopping:
                raise self._interrupted()
            if self._due(config.validation.every):
                self._validate_unless_stopped(stop)
            waiting = time.perf_counter()

    def _batches(self) -> Iterator[list[Batch]]:
        """Micro-batches of each step that is left; to read ahead takes memory too."""
        steps = iter(self.loader.steps(self.step, self.config.steps, self.world.device))
        while True:
            with memory_errors(self.config, self.engine.module, (), self.world, READING):
                batches = next(steps, None)
            if batches is None:
                return
            yield batches

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped at step {self.step}; the same command continues")

    def _validate_unless_stopped(self, stop: StopRequest) -> None:
        """Validate, or leave it to who continues: who asks to stop may not wait for it.

        Raises:
            Interrupted: after a request to stop, once a checkpoint is written.
        """
        if self._validate(stop):
            return
        if self.saved_step != self.step:
            self._save()
        raise self._interrupted()

    def _due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last, is to be done."""
        return self.step == self.config.steps or self.step % every == 0

    def _validation_was_cut_off(self) -> bool:
        """Whether the run ended between the checkpoint it goes on from and that step's figures."""
        if not (self.step and self._due(self.config.validation.every)):
            return False
        settings = self.config.validation
        if not (len(self.held_out) and (settings.samples or settings.videos)):
            return False
        wanted = "validation_loss" if settings.samples else VIDEOS
        rows = read_metrics(self.job.metrics_path) if self.world.is_main else ()
        known = any(row["step"] == self.step and wanted in row for row in rows)
        return not any(self.world.gather(known))

    def _train_step(
        self, batches: list[Batch], stop: StopRequest
    ) -> tuple[list[MicroLoss], list[int]]:
        """One optimizer step over its micro-batches, without a wait for the device in between.

        Returns:
            Each micro-batch's loss, which stays on the device, and its extra forward passes.
        """
        config = self.config
        set_learning_rate(self.engine, learning_rate(config.optimizer, self.step, config.steps))
        losses, extra_forwards = [], []
        for batch in batches:
            extra_forwards.append(self.objective.extra_forwards(batch.draws))
            loss, figures = self.objective(self.engine, batch, batch.draws)
            self.engine.backward(loss)
            if batch is batches[-1]:
                stop.ask()
            self.engine.step()
            losses.append(MicroLoss(loss.detach(), len(batch.clip_ids), figures))
        self.step += 1
        skipped = bool(self.engine.optimizer.overflow)
        if not skipped:
            self.ema.update()
        self.skipped.note(self.step, skipped, batches, [micro.loss for micro in losses])
        return losses, extra_forwards

    def _meter(self) -> StepMeter:
        config, device = self.config, self.world.device
        return StepMeter(
            model=self.job.model,
            world_size=self.world.size,
            device=device,
            peak=device_peak_flops(device) if config.precision == "bfloat16" else None,
            recomputed=recomputed_blocks(config.activation_checkpointing, self.job.model.depth),
        )

    def _log(self, losses: Sequence[MicroLoss], meter: StepMeter) -> None:
        """Compute the last step's figures, as means over all ranks, and record them."""
        config, means = self.config, Means()
        for loss, clips, more in losses:
            means.add({"loss": Mean(loss * clips, torch.full_like(loss, clips)), **more()})
        figures = means.reduce(self.world) | {
            "epoch": self.loader.order.epoch(self.step - 1),
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "skipped_steps": self.skipped.count,
            **meter.flush(config.steps - self.step),
        }
        # Of the rank that waits or takes most: the others wait for it in what looks like work.
        worst = {name: figures[name] for name in ("data_wait_share", "peak_memory_gib")}
        for name in worst:
            figures[name] = max(found[name] for found in self.world.gather(worst))
        self.records.write(self.step, figures)

    def _validate(self, stop: StopRequest) -> bool:
        """Held-out loss and videos of the averaged weights, and the loss of the last ones.

        Returns:
            Whether it is done; False if a request to stop broke it off, and nothing is recorded.
        """
        if not len(self.held_out):
            return True
        settings, done = self.config.validation, True
        figures: dict[str, float] = {}
        with memory_errors(self.config, self.engine.module, (), self.world, VALIDATING):
            self.engine.eval()
            if self.config.ema_decay and settings.samples:
                done = self._add_held_out_figures(figures, stop, "_raw")
            with self.ema.model_averaged() if self.config.ema_decay else nullcontext():
                if done and settings.samples:
                    done = self._add_held_out_figures(figures, stop)
                if done and settings.videos:
                    done = self._sample_videos(settings.videos, stop)
                    figures[VIDEOS] = float(settings.videos)
        self.engine.train()
        if done and figures:
            self.records.write(self.step, figures)
        return done

    def _add_held_out_figures(
        self, figures: dict[str, float], stop: StopRequest, suffix: str = ""
    ) -> bool:
        """Add the figures of held-out clips, if no request to stop breaks it off."""
        found = validate(
            self.engine,
            self.objective,
            self.held_out,
            self.held_out_loader,
            self.config.validation.samples,
            self.world,
            stop,
        )
        if found is not None:
            figures.update({f"validation_{name}{suffix}": v for name, v in found.items()})
        return found is not None

    def _sample_videos(self, count: int, stop: StopRequest) -> bool:
        """Make videos, if no request to stop breaks it off."""
        name = f"samples/step-{self.step:08d}"
        folder = Path(self.job.out) / name
        done = sample_videos(self.engine, self.job, self.held_out, count, folder, self.world, stop)
        if done:
            self.records.artifact(folder, name)
        return done

    def _save(self) -> None:
        facts = CheckpointFacts(
            step=self.step,
            samples=self.step * self.config.global_batch,
            world_size=self.world.size,
            zero_stage=self.config.zero_stage,
            fingerprint=self.fingerprint,
            run_id=self.records.run_id,
            settings=self.settings,
            skipped_steps=self.skipped.count,
            skipped_in_a_row=self.skipped.in_a_row,
        )
        with memory_errors(self.config, self.engine.module, (), self.world, SAVING):
            folder = save_checkpoint(
                self.checkpoints,
                self.engine,
                self.ema,
                facts,
                self.world,
                self.config.checkpoint,
            )
        self.saved_step = self.step
        self.records.tag("checkpoint", str(folder))
