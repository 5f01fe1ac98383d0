"""Trains the project's causal autoencoder on curated clips: `streamdit train-autoencoder`.

The linear path starts at the principal components of some clips, so that training begins from
the best linear autoencoder. Then the whole is trained as a variational autoencoder with a small
KL weight (Kingma and Welling, arXiv:1312.6114), and latents are normalised per channel by the
mean and deviation that they have on training clips.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamdit.autoencoder.causal import FACTORS, CausalAutoencoder
from streamdit.autoencoder.io import read_record, save_autoencoder
from streamdit.config import AutoencoderIdentity
from streamdit.devices import to_device
from streamdit.errors import UserError
from training.autoencoder_clips import Clips, batches, open_clips
from training.autoencoder_config import UNESSENTIAL, AutoencoderTrainConfig
from training.autoencoder_quality import (
    autoencoder_loss,
    mean_psnr,
    measure_statistics,
    mixed_precision,
    to_video,
)

CHECKPOINT_FOLDER = "checkpoints"
FINAL_RATE_SHARE = 0.02

Log = Callable[[int, dict[str, float]], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AutoencoderTrainSummary:
    """What came out of training.

    Attributes:
        directory: what :func:`streamdit.autoencoder.load_autoencoder` takes.
        identity: identity of the weights.
        steps: optimizer steps done.
        seconds: time spent in training, over all runs that were resumed.
        psnr: mean peak signal-to-noise ratio of reconstructed clips, in decibels.
        psnr_split: clips that it was measured on: `held_out`, or `train` if none are held out.
        parameters: size of the model.
        resumed_from: step of the checkpoint that this call went on from; `steps` if there was
            nothing left to do.
    """

    directory: Path
    identity: AutoencoderIdentity
    steps: int
    seconds: float
    psnr: float
    psnr_split: str
    parameters: int
    resumed_from: int


def train_autoencoder(
    dataset_dir: Path | str,
    out_dir: Path | str,
    config: AutoencoderTrainConfig,
    on_log: Log | None = None,
) -> AutoencoderTrainSummary:
    """Train an autoencoder on the clips of a curated dataset, and save it.

    Runs on CUDA in bfloat16 where there is a device, else on the CPU in float32. An interrupted
    run goes on from its last checkpoint and ends with the weights of an uninterrupted one; a
    finished one is not repeated.

    Args:
        dataset_dir: where `curate` wrote its clip table.
        out_dir: directory of the autoencoder to write.
        config: how to train.
        on_log: called with (step, metrics) for every log line. Metrics are `loss` and its terms,
            `psnr` of the batch in decibels, `learning_rate`, `clips_per_s`, `data_wait` (share of
            the time spent waiting for clips), `seconds`, and now and then `held_out_psnr`.

    Raises:
        UserError: if there are no clips, they do not fit the configuration, or `out_dir` holds
            another run.
    """
    out_dir = Path(out_dir)
    train, held_out = open_clips(dataset_dir, config.held_out_share, config.cache_mb)
    crop = common_crop(train, config)
    fingerprint = run_fingerprint(config, train)
    finished = finished_summary(out_dir, fingerprint)
    if finished is not None:
        return finished
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with cpu_threads(config.threads):
        run = Run.start(config, train, crop, device)
        resumed_from = run.restore(out_dir / CHECKPOINT_FOLDER, fingerprint)
        checks = held_out if len(held_out) else train
        run.train(train, checks, crop, out_dir / CHECKPOINT_FOLDER, fingerprint, on_log)
        return finish(run, train, checks, out_dir, fingerprint, resumed_from, held_out is checks)


class Run:
    """Model, optimizer and clock of one training run."""

    def __init__(self, model: CausalAutoencoder, config: AutoencoderTrainConfig) -> None:
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        linear = [p for name, p in model.named_parameters() if ".linear." in name]
        others = [p for name, p in model.named_parameters() if ".linear." not in name]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": others, "share": 1.0},
                {"params": linear, "share": config.linear_rate_share},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        self.step = 0
        self.seconds = 0.0

    @staticmethod
    def start(
        config: AutoencoderTrainConfig, train: Clips, crop: tuple[int, int], device: torch.device
    ) -> Run:
        """A run at step 0, its linear path fitted to training clips."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = CausalAutoencoder(config.model)
        rows, columns = (size // FACTORS[1] * FACTORS[1] for size in crop)
        pictures = [
            to_video(torch.from_numpy(clip[None, : config.frames, :rows, :columns]))
            for clip in train.sample(config.fit_clips, config.seed)
        ]
        model.fit_linear_path(torch.cat(pictures), whiten=config.normalisation == "channel")
        return Run(model.to(device), config)

    def train(
        self,
        train: Clips,
        checks: Clips,
        crop: tuple[int, int],
        checkpoints: Path,
        fingerprint: str,
        on_log: Log | None,
    ) -> None:
        """Take steps until the budget is spent."""
        config = self.config
        stream = batches(
            train, config.seed, config.batch, config.frames, crop, self.step, config.workers,
            pin=self.device.type == "cuda",
        )  # fmt: skip
        with closing(stream):
            waited, last_step, last_seconds = 0.0, self.step, self.seconds
            while self.progress < 1.0:
                began = time.perf_counter()
                clips = next(stream)
                waited += time.perf_counter() - began
                metrics = self.train_step(to_video(clips.to(self.device, non_blocking=True)))
                logging_step = self.step % config.log_every == 0
                if logging_step:
                    metrics = {name: float(value) for name, value in metrics.items()}
                self.seconds += time.perf_counter() - began
                if logging_step and on_log is not None:
                    spent = self.seconds - last_seconds
                    metrics |= {
                        "clips_per_s": (self.step - last_step) * config.batch / spent,
                        "data_wait": waited / spent,
                        "seconds": self.seconds,
                    }
                    on_log(self.step, metrics)
                    waited, last_step, last_seconds = 0.0, self.step, self.seconds
                if self.step % config.held_out_every == 0 and on_log is not None:
                    psnr = mean_psnr(self.model, checks, config)
                    on_log(self.step, {"held_out_psnr": psnr})
                if self.step % config.checkpoint_every == 0:
                    self.save(checkpoints, fingerprint)

    def train_step(self, video: Tensor) -> dict[str, Tensor | float]:
        """One optimizer step on `video [b, t, 3, h, w]`."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.model.train()
        with mixed_precision(self.device):
            mean, logvar = self.model.posterior(video)
            noise = to_device(posterior_noise(mean.shape, self.config.seed, self.step), self.device)
            reconstruction = self.model.reconstruct(mean + noise * (0.5 * logvar).exp())
        loss, terms = autoencoder_loss(video, reconstruction, mean, logvar, self.config.loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.step += 1
        return {**terms, "learning_rate": rate}

    @property
    def progress(self) -> float:
        """Share of the budget that is spent: of steps, or of time where that is more."""
        steps = self.step / self.config.steps
        return (
            steps if self.config.seconds is None else max(steps, self.seconds / self.config.seconds)
        )

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine over what is left of the budget."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.progress)))
        share = FINAL_RATE_SHARE + (1.0 - FINAL_RATE_SHARE) * cosine
        warmup = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        return self.config.learning_rate * share * warmup

    def save(self, checkpoints: Path, fingerprint: str) -> None:
        """Write a checkpoint (its folder's name appears only when it is whole); drop older ones."""
        folder = checkpoints / f"step-{self.step:08d}"
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: t.detach().cpu() for name, t in self.model.state_dict().items()}
        save_file(weights, partial / "weights.safetensors")
        torch.save(self.optimizer.state_dict(), partial / "optimizer.pt")
        facts = {"step": self.step, "seconds": self.seconds, "fingerprint": fingerprint}
        (partial / "state.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        older = saved_checkpoints(checkpoints)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in older:
            if old != folder:
                shutil.rmtree(old)

    def restore(self, checkpoints: Path, fingerprint: str) -> int:
        """Go on from the newest checkpoint, if there is one; returns the step reached."""
        found = saved_checkpoints(checkpoints)
        if not found:
            return 0
        folder = found[-1]
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        refuse_another_run(checkpoints.parent, facts["fingerprint"], fingerprint)
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))
        # Loading moves the moments to the weights' device; counts of steps belong to the host.
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)
        self.step, self.seconds = facts["step"], facts["seconds"]
        return self.step


def finish(
    run: Run,
    train: Clips,
    checks: Clips,
    out_dir: Path,
    fingerprint: str,
    resumed_from: int,
    held_out: bool,
) -> AutoencoderTrainSummary:
    """Measure, save the final directory, and drop the checkpoints."""
    scale, shift = measure_statistics(run.model, train, run.config)
    psnr = mean_psnr(run.model, checks, run.config)
    if not held_out:
        log.warning(
            "no clip is held out, so PSNR is measured on training clips; ingest more videos or "
            "raise held_out_share"
        )
    run.model.identity = run.model.identity.model_copy(update={"scale": scale, "shift": shift})
    facts = {
        "steps": run.step,
        "seconds": round(run.seconds, 1),
        "psnr": round(psnr, 3),
        "psnr_split": "held_out" if held_out else "train",
        "clips": len(train),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "fingerprint": fingerprint,
        "config": run.config.model_dump(mode="json", exclude={"model"}),
    }
    save_autoencoder(run.model, out_dir, facts)
    shutil.rmtree(out_dir / CHECKPOINT_FOLDER, ignore_errors=True)
    summary = finished_summary(out_dir, fingerprint, resumed_from)
    assert summary is not None
    return summary


def finished_summary(
    out_dir: Path, fingerprint: str, resumed_from: int | None = None
) -> AutoencoderTrainSummary | None:
    """Summary of a finished run in `out_dir`, or None.

    Raises:
        UserError: if another run finished there.
    """
    record = read_record(out_dir)
    if record is None:
        return None
    facts = record.training
    refuse_another_run(out_dir, facts.get("fingerprint", ""), fingerprint)
    return AutoencoderTrainSummary(
        directory=out_dir,
        identity=record.identity(str(out_dir)),
        steps=facts["steps"],
        seconds=facts["seconds"],
        psnr=facts["psnr"],
        psnr_split=facts["psnr_split"],
        parameters=facts["parameters"],
        resumed_from=facts["steps"] if resumed_from is None else resumed_from,
    )


def refuse_another_run(out_dir: Path, found: str, wanted: str) -> None:
    """Raise unless the run in `out_dir` is the one that is asked for."""
    if found != wanted:
        raise UserError(
            f"{out_dir} holds an autoencoder trained with another configuration or on other clips; "
            "choose another output directory, or remove this one"
        )


def run_fingerprint(config: AutoencoderTrainConfig, train: Clips) -> str:
    """Hash of what decides the weights: the configuration and the training clips."""
    settings = config.model_dump_json(exclude=set(UNESSENTIAL))
    return hashlib.sha256(f"{settings}\n{train.fingerprint()}".encode()).hexdigest()


def common_crop(train: Clips, config: AutoencoderTrainConfig) -> tuple[int, int]:
    """Rows and columns of a training sample.

    Raises:
        UserError: if some clip is too short or small, or sizes differ and no crop is set.
    """
    shortest = min(row["frames"] for row in train.rows)
    if config.frames > shortest:
        raise UserError(
            f"frames {config.frames} is more than the {shortest} frames of the shortest clip; set "
            f"frames to {shortest // FACTORS[0] * FACTORS[0]} or less"
        )
    sizes = sorted({(row["height"], row["width"]) for row in train.rows})
    smallest = (min(h for h, _ in sizes), min(w for _, w in sizes))
    if config.crop is None and len(sizes) > 1:
        raise UserError(
            f"clips have {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]}, and a batch needs "
            f"one; set crop to [{smallest[0]}, {smallest[1]}] or less"
        )
    rows, columns = config.crop or smallest
    factor = FACTORS[1]
    if rows % factor or columns % factor or rows > smallest[0] or columns > smallest[1]:
        fitting = [max(1, size // factor) * factor for size in smallest]
        raise UserError(
            f"crop [{rows}, {columns}] does not fit: it must be multiples of {factor} within the "
            f"smallest clip {list(smallest)}; set crop to {fitting} or less"
        )
    return rows, columns


def posterior_noise(shape: torch.Size, seed: int, step: int) -> Tensor:
    """Unit Gaussian noise `[b, f, C, h, w]`; each sample's is decided by (seed, step, index)."""
    samples = []
    for index in range(shape[0]):
        generator = torch.Generator()
        # A third word apart from the data order's, so that the two draws are not related.
        words = np.random.SeedSequence([seed, step, index, 1]).generate_state(1, np.uint64)
        generator.manual_seed(int(words[0] >> np.uint64(1)))
        samples.append(torch.randn(shape[1:], generator=generator))
    return torch.stack(samples)


def saved_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in checkpoints.glob("step-*") if p.suffix != ".partial")


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Use `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
