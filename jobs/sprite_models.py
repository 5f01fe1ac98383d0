"""Teacher and student of a sprite world, from nothing: world, data set, autoencoder, training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillation.config import DistillConfig
from evaluation.sprites import SpriteWorldConfig, make_world
from jobs.console import console, progress, say
from jobs.distill import distillation_job
from jobs.launch import launch
from jobs.train_autoencoder import train_tracked
from jobs.training_job import training_job
from pipeline.annotate import annotate
from pipeline.config import IngestConfig
from pipeline.curate import curate
from pipeline.encode import encode
from streamdit.config import StrictModel
from training.autoencoder_config import AutoencoderTrainConfig
from training.config import TrackingConfig, TrainConfig


class SpriteStages(StrictModel):
    """Settings of the world and of every stage on the way to a student."""

    world: SpriteWorldConfig
    """The videos."""
    ingest: IngestConfig
    """Curate, annotate, encode."""
    autoencoder: AutoencoderTrainConfig
    """The autoencoder."""
    train: TrainConfig
    """The teacher."""
    distill: DistillConfig
    """The student."""


@dataclass(frozen=True)
class SpriteData:
    """The world, ready for training."""

    videos: list[Path]
    curated: Any
    autoencoder: Any
    dataset: Path


@dataclass(frozen=True)
class SpriteModels:
    """Model directories of a teacher and its student."""

    teacher: Path
    student: Path


class StageClock:
    """Numbers the stages and measures their work; kept on disk, so that interrupted work adds up.

    Args:
        path: where seconds by stage are kept.
        stages: how many there will be.
    """

    def __init__(self, path: Path, stages: int) -> None:
        self.path = path
        self.stages = stages
        self.begun = 0
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and measure it."""
        self.begun += 1
        title = f"{self.begun}/{self.stages} {name}"
        console.rule(f"[bold]{title}", align="left")
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[title] = self.seconds.get(title, 0.0) + spent
            self.path.write_text(json.dumps(self.seconds, indent=2) + "\n")

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def make_sprite_data(
    settings: SpriteStages, out: Path, tracking: TrackingConfig, clock: StageClock
) -> SpriteData:
    """Four stages, from nothing to an encoded data set; finished ones are not done again."""
    dataset = out / "dataset"
    with clock.stage("Make the sprite world"), progress("videos", unit="videos") as on:
        videos = make_world(out / "world", settings.world, lambda done, total: on(done, total, {}))
    with clock.stage("Curate and annotate"):
        with progress("curate") as shown:
            curated = curate([str(out / "world")], dataset, settings.ingest, shown, replace=True)
        with progress("annotate") as shown:
            annotate(dataset, settings.ingest, shown)
        say(f"{curated.sources} videos, {curated.clips} clips, {curated.dead} dead inputs")
    with clock.stage("Train the autoencoder"):
        autoencoder = train_tracked(dataset, out / "autoencoder", settings.autoencoder, tracking)
    with clock.stage("Encode latents"), progress("encode") as shown:
        encode(dataset, str(out / "autoencoder"), settings.ingest, shown, replace=True)
    return SpriteData(videos, curated, autoencoder, dataset)


def train_sprite_models(
    settings: SpriteStages,
    dataset: Path,
    out: Path,
    tracking: TrackingConfig,
    clock: StageClock,
    seed: int | None = None,
) -> SpriteModels:
    """Two stages: the teacher and its student in `out`; finished ones are not done again.

    Args:
        settings: of all stages.
        dataset: what :func:`make_sprite_data` made.
        out: where the runs go.
        tracking: where they are tracked.
        clock: of all stages.
        seed: added to the seeds of both trainings, and named in the titles; none leaves them alone.
    """
    suffix, named = ("", "") if seed is None else (f"-seed-{seed}", f", seed {seed}")
    train, distill = (
        config.model_copy(update={"tracking": tracking, "seed": config.seed + (seed or 0)})
        for config in (settings.train, settings.distill)
    )
    with clock.stage(f"Train StreamDiT{named}"):
        teacher = launch(training_job(train, dataset, out / "teacher", name=f"teacher{suffix}"))
    with clock.stage(f"Distil{named}"):
        student = launch(
            distillation_job(distill, dataset, teacher, out / "student", name=f"student{suffix}")
        )
    return SpriteModels(teacher, student)
