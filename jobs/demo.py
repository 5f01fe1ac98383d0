"""`streamdit demo`: the whole path, small, from video files to a registered model that streams."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from pydantic import Field

import streamdit
from evaluation.sheets import contact_sheet, write_video
from evaluation.sprites import SpritePrompt, SpriteWorldConfig, held_out_prompts
from jobs.config import load_config
from jobs.console import console, format_duration, progress, say
from jobs.demo_page import DemoResults, SystemResult, write_page
from jobs.evaluate import ScoredVideo, cached_videos, generate_videos, score_videos
from jobs.generate import PromptChange, stream_frames
from jobs.options import ConfigFile, Overrides
from jobs.runtime import ray_runtime
from jobs.sprite_models import SpriteStages, StageClock, make_sprite_data, train_sprite_models
from pipeline.lock import writing
from streamdit.config import SamplingConfig, StrictModel
from streamdit.io import read_model_config
from training.config import TrackingConfig
from training.registry import RegisteredVersion, find_registered, register


class DemoConfig(StrictModel):
    """What the demo itself decides; its stages have their own configurations."""

    world: SpriteWorldConfig
    """The videos that it makes."""
    evaluation_prompts: int = Field(gt=0)
    """Held-out prompts that every model is scored on."""
    evaluation_frames: int = Field(ge=8)
    """Video frames per scored video."""
    evaluation_seed: int = 1000
    """Seed of the first scored video."""
    stream_frames: int = Field(ge=16)
    """Video frames of the streamed video."""
    stream_prompts: tuple[str, ...] = Field(min_length=1)
    """Its prompts, each in force for an equal share."""
    registered_name: str = "streamdit-demo"
    """Registered model in MLflow."""
    alias: str = "demo"
    """Alias of the registered version."""


class DemoSettings(DemoConfig, SpriteStages):
    """The demo's own settings and those of every stage."""


def command(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Everything goes here.")] = Path(
        "runs/demo"
    ),
    config: ConfigFile = None,
) -> None:
    """Run the whole path on a small made-up world of moving shapes.

    Makes videos, curates and annotates them, trains an autoencoder, encodes, trains a small
    StreamDiT, distils it, registers it in MLflow, streams from the registered model and writes a
    page about it all: OUT/summary.html. Takes 10 to 20 minutes on two CPU cores. It can be
    interrupted: the same command continues, and finished parts are not done again.

    Settings of a stage take its name as prefix: `train.steps=600`, `world.videos=40`.
    """
    settings = load_config(
        DemoSettings,
        stage="demo",
        preset="demo",
        file=config,
        overrides=overrides or (),
        sections=("ingest", "autoencoder", "train", "distill"),
    )
    with ray_runtime():
        page = run_demo(settings, out)
    console.print(f"\n[bold]Open {page}[/bold]")


def run_demo(settings: DemoSettings, out: Path) -> Path:
    """All stages in turn; returns the summary page."""
    out.mkdir(parents=True, exist_ok=True)
    clock = StageClock(out / "stage-seconds.json", stages=8)
    tracking = TrackingConfig(directory=str(out / "mlflow"), experiment="streamdit-demo")
    with writing(out / "dataset", "streamdit demo", say):
        data = make_sprite_data(settings, out, tracking, clock)
    models = train_sprite_models(settings, data.dataset, out, tracking, clock)
    with clock.stage("Score on prompts never trained on"):
        systems = score_systems(settings, models.teacher, models.student, out)
    with clock.stage("Register and stream"):
        scores = {k: v for k, v in systems[-1].summary.items() if k != "count"}
        registered = registered_once(models.student, settings, tracking, scores)
        stream_video, stream_seconds = stream_registered(registered, settings, out)
        sheet = out / "contact-sheet.png"
        rows = [
            (f"{system.label}: {video.prompt.caption()}", video.frames)
            for system in systems
            for video in system.videos[:1]
        ]
        prompts = " → ".join(settings.stream_prompts)
        contact_sheet([*rows, (f"Streamed by the student: {prompts}", stream_video)], 10, 2).save(
            sheet
        )
    page = write_page(
        out,
        DemoResults(
            videos=data.videos,
            curated=data.curated,
            autoencoder=data.autoencoder,
            systems=systems,
            registered=registered,
            stream=stream_video,
            stream_prompts=list(settings.stream_prompts),
            stream_seconds=stream_seconds,
            stage_seconds=clock.seconds,
            world=settings.world,
            train=settings.train,
            distill=settings.distill,
            mlflow_command=mlflow_command(out),
        ),
    )
    tell(systems, registered, out, clock)
    return page


def score_systems(demo: DemoConfig, teacher: Path, student: Path, out: Path) -> list[SystemResult]:
    """Teacher, teacher at the student's few steps, and student, on the same prompts and noise.

    Scores and videos are kept in `out` and made again only for other weights or settings.
    """
    own = read_model_config(teacher).sampling
    few = SamplingConfig(
        chunk_frames=own.chunk_frames,
        reference_frames=own.reference_frames,
        micro_steps=1,
        guidance_scale=1.0,
    )
    distilled = read_model_config(student).sampling
    plans = [
        ("teacher", "Teacher", teacher, own),
        ("few-step", "Teacher, few steps, not distilled", teacher, few),
        ("student", "Student, distilled", student, distilled),
    ]
    prompts = held_out_prompts(demo.world)[: demo.evaluation_prompts]
    return [
        SystemResult(name, label, sampling, score_system(demo, name, model, sampling, prompts, out))
        for name, label, model, sampling in plans
    ]


def score_system(
    demo: DemoConfig,
    name: str,
    model: Path,
    sampling: SamplingConfig,
    prompts: Sequence[SpritePrompt],
    out: Path,
) -> list[ScoredVideo]:
    """Scored videos of one system, made again only if anything about it has changed."""
    key = {
        "weights": read_model_config(model).weights_sha256,
        "sampling": sampling.model_dump(),
        "prompts": [prompt.caption() for prompt in prompts],
        "frames": demo.evaluation_frames,
        "seed": demo.evaluation_seed,
    }

    def make() -> np.ndarray:
        with progress(f"score {name}", unit="videos") as shown:
            return generate_videos(
                str(model),
                sampling,
                [prompt.caption() for prompt in prompts],
                demo.evaluation_seed,
                demo.evaluation_frames,
                on_progress=shown,
            )

    return score_videos(cached_videos(out / "scored" / f"{name}.npz", key, make), prompts)


def registered_once(
    student: Path, demo: DemoConfig, tracking: TrackingConfig, scores: dict[str, float]
) -> RegisteredVersion:
    """Register the student, unless the alias points to these very weights already."""
    weights = read_model_config(student).weights_sha256
    found = find_registered(demo.registered_name, demo.alias, tracking)
    if found is not None and found.tags.get("weights_sha256") == weights:
        say(f"{found.uri} is version {found.version} already")
        return found
    registered = register(student, demo.registered_name, demo.alias, tracking, scores)
    say(f"registered {registered.uri} as version {registered.version}")
    return registered


def stream_registered(
    registered: RegisteredVersion, demo: DemoConfig, out: Path
) -> tuple[np.ndarray, float]:
    """Stream from the registry with prompt changes; the frames, and seconds of streaming."""
    model = streamdit.load(registered.uri)
    share = demo.stream_frames // len(demo.stream_prompts)
    changes = [
        PromptChange(index * share, prompt) for index, prompt in enumerate(demo.stream_prompts)
    ]
    started = time.monotonic()
    chunks = [
        chunk.frames for chunk in stream_frames(model, changes, demo.stream_frames, demo.world.seed)
    ]
    seconds = time.monotonic() - started
    video = np.concatenate(chunks)[: demo.stream_frames]
    write_video(out / "stream.mp4", video, model.config.fps, upscale=4)
    rate = len(video) / seconds
    say(f"streamed {len(video)} frames in {format_duration(seconds)} ({rate:.0f} FPS)")
    return video, seconds


def tell(
    systems: Sequence[SystemResult], registered: RegisteredVersion, out: Path, clock: StageClock
) -> None:
    """The result in the terminal."""
    from rich.table import Table

    table = Table(title="Scores on prompts never trained on", title_justify="left")
    table.add_column("model")
    for heading in ("colour", "shape", "direction", "background", "area ÷ true"):
        table.add_column(heading, justify="right")
    for system in systems:
        values = system.summary
        cells = [f"{values[key]:.2f}" for key in ("colour", "shape", "direction", "background")]
        table.add_row(system.label, *cells, f"{values['area_ratio_mean']:.2f}")
    console.print(table)
    say(f"time: {format_duration(clock.total)} of work")
    say(f"model: {registered.uri} in {registered.tracking_uri}")
    say(f"MLflow: {mlflow_command(out)}")


def mlflow_command(out: Path) -> str:
    """Command that opens the MLflow UI on the demo's store."""
    return f"mlflow ui --backend-store-uri sqlite:///{out.resolve()}/mlflow/mlflow.db"


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
