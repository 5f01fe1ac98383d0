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

STAGES = 6


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
class SpriteModels:
    """What the stages made."""

    videos: list[Path]
    curated: Any
    autoencoder: Any
    teacher: Path
    student: Path


class StageClock:
    """Seconds of work per stage, kept on disk, so that interrupted work adds them up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and measure it."""
        console.rule(f"[bold]{name}", align="left")
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.path.write_text(json.dumps(self.seconds, indent=2) + "\n")

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def make_sprite_models(
    settings: SpriteStages, out: Path, tracking: TrackingConfig, clock: StageClock, stages: int
) -> SpriteModels:
    """Run the first :data:`STAGES` of `stages` stages; finished ones are not done again."""
    dataset = out / "dataset"
    train = settings.train.model_copy(update={"tracking": tracking})
    distill = settings.distill.model_copy(update={"tracking": tracking})

    with clock.stage(f"1/{stages} Make the sprite world"), progress("videos", unit="videos") as on:
        videos = make_world(out / "world", settings.world, lambda done, total: on(done, total, {}))
    with clock.stage(f"2/{stages} Curate and annotate"):
        with progress("curate") as shown:
            curated = curate([str(out / "world")], dataset, settings.ingest, shown, replace=True)
        with progress("annotate") as shown:
            annotate(dataset, settings.ingest, shown)
        say(f"{curated.sources} videos, {curated.clips} clips, {curated.dead} dead inputs")
    with clock.stage(f"3/{stages} Train the autoencoder"):
        autoencoder = train_tracked(dataset, out / "autoencoder", settings.autoencoder, tracking)
    with clock.stage(f"4/{stages} Encode latents"), progress("encode") as shown:
        encode(dataset, str(out / "autoencoder"), settings.ingest, shown, replace=True)
    with clock.stage(f"5/{stages} Train StreamDiT"):
        teacher = launch(training_job(train, dataset, out / "teacher", name="teacher"))
    with clock.stage(f"6/{stages} Distil"):
        student = launch(
            distillation_job(distill, dataset, teacher, out / "student", name="student")
        )
    return SpriteModels(videos, curated, autoencoder, teacher, student)
