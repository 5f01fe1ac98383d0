"""What distillation keeps, measured on a made-up world whose videos can be marked exactly."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from pydantic import Field

from evaluation.sprite_benchmark import (
    SystemFigures,
    agreement_marks,
    background_flicker,
    marks_by_axis,
    mean_marks,
    merge_seeds,
)
from evaluation.sprite_report import markdown, plot, verdicts
from evaluation.sprites import SpritePrompt, SpriteWorldConfig, held_out_prompts
from jobs.config import load_config
from jobs.console import format_duration, progress, say
from jobs.runtime import ray_runtime
from jobs.sprite_models import (
    SpriteModels,
    SpriteStages,
    StageClock,
    make_sprite_data,
    train_sprite_models,
)
from jobs.sprite_systems import System, plan_systems, stream_costs
from pipeline.lock import writing
from streamdit.config import StrictModel
from streamdit.errors import UserError
from streamdit.io import read_model_config
from training.config import TrackingConfig

BATCH = 8
SEED_STRIDE = 100_000
STAGES_FILE = "stage-seconds.json"


class SpriteBenchConfig(StrictModel):
    """Size of the benchmark; presets are `configs/bench/*.yaml`."""

    models: str = "demo"
    """Preset of every stage that makes the models."""
    changes: tuple[str, ...] = ()
    """Settings of the stages over it, `dotted.key=value` each."""
    prompts: int = Field(gt=0)
    """Held-out prompts on which accuracy is measured."""
    frames: int = Field(ge=8)
    """Video frames that an accuracy is read from."""
    drift_prompts: int = Field(gt=0)
    """Prompts whose streams go on for as long as `drift_buffers` asks."""
    drift_buffers: tuple[int, ...] = Field(default=(1, 4, 16), min_length=1)
    """Buffer lengths after the start at which long streams are read again."""
    seeds: int = Field(default=3, gt=0)
    """Each gives one value, and intervals are over them: seeds of training, distillation and noise
    where the models are made, of the noise alone where they are given."""


def run(
    overrides: Sequence[str],
    out: Path,
    preset: str,
    config: Path | None = None,
    teachers: Sequence[Path] = (),
    students: Sequence[Path] = (),
) -> None:
    """Make the models, or take the given ones, measure them, and write the report to `out`.

    Args:
        overrides: `key=value` of the benchmark, or of the stages that make the models.
        out: folder of the benchmark.
        preset: of the benchmark.
        config: YAML file over the preset.
        teachers: models to measure, instead of making them.
        students: one for each of them.

    Raises:
        UserError: if the settings or the models do not fit.
    """
    own = [text for text in overrides if text.split("=")[0] in SpriteBenchConfig.model_fields]
    bench = load_config(SpriteBenchConfig, stage="bench", preset=preset, file=config, overrides=own)
    stages = [text for text in overrides if text not in own]
    given = _given_models(teachers, students, bench.seeds)
    settings = _stage_settings(bench, stages, given)
    out.mkdir(parents=True, exist_ok=True)
    with ray_runtime():
        pairs = given or _make_models(settings, bench.seeds, out)
        systems = [plan_systems(pair.teacher, pair.student) for pair in pairs]
        _check_alike(systems)
        figures = measure(systems * (bench.seeds // len(pairs)), bench, settings.world, out)
    report(figures, bench, pairs, out, made=not given)


def _given_models(
    teachers: Sequence[Path], students: Sequence[Path], seeds: int
) -> list[SpriteModels]:
    """The given pairs: one training that serves every seed, or one for each; or none."""
    if len(teachers) != len(students):
        raise UserError("--teacher and --student belong together; give both, or none")
    if len(teachers) > 1 and len(teachers) != seeds:
        raise UserError(
            f"{len(teachers)} trainings are given for {seeds} seeds; set seeds={len(teachers)}, or "
            "give one"
        )
    return [SpriteModels(*pair) for pair in zip(teachers, students, strict=True)]


def _check_alike(by_seed: Sequence[Sequence[System]]) -> None:
    """Refuse to take seeds together whose systems are sampled in other ways.

    Raises:
        UserError: naming two that differ.
    """
    for seed, systems in enumerate(by_seed):
        for system, first in zip(systems, by_seed[0], strict=True):
            if (system.label, system.sampling) != (first.label, first.sampling):
                raise UserError(
                    f"{system.model} is measured as {system.label} but {first.model} as "
                    f"{first.label}; seed {seed} must be distilled as the first, or measured apart"
                )
            mine, theirs = (_pictures(Path(each.model)) for each in (system, first))
            if mine != theirs:
                raise UserError(
                    f"{system.model} makes {mine} but {first.model} {theirs}; seed {seed} must "
                    "have the first one's shape, or be measured apart"
                )


def _pictures(model: Path) -> str:
    """What decides how long a buffer of a model lasts."""
    config = read_model_config(model)
    frames = config.model.buffer_frames * config.autoencoder.temporal_factor
    return f"buffers of {frames} frames at {config.fps:g} frames per second"


def _stage_settings(
    bench: SpriteBenchConfig, overrides: Sequence[str], given: Sequence[SpriteModels]
) -> SpriteStages:
    """Settings of the world, and of the stages that make models where none are given."""
    from jobs.demo import DemoSettings

    for text in overrides:
        if given and not text.startswith("world."):
            raise UserError(f"{text} sets how models are made, but the models are given")
    return load_config(
        DemoSettings,
        stage="demo",
        preset=bench.models,
        overrides=[*bench.changes, *overrides],
        sections=("ingest", "autoencoder", "train", "distill"),
    )


def _make_models(settings: SpriteStages, seeds: int, out: Path) -> list[SpriteModels]:
    """A teacher and its student for every seed, on one data set; finished ones are kept."""
    tracking = TrackingConfig(directory=str(out / "mlflow"), experiment="streamdit-bench-sprites")
    clock = StageClock(out / STAGES_FILE, stages=4 + 2 * seeds)
    with writing(out / "dataset", "streamdit bench sprites", say):
        data = make_sprite_data(settings, out, tracking, clock)
    return [
        train_sprite_models(settings, data.dataset, out / f"seed-{seed}", tracking, clock, seed)
        for seed in range(seeds)
    ]


def measure(
    by_seed: Sequence[Sequence[System]],
    bench: SpriteBenchConfig,
    world: SpriteWorldConfig,
    out: Path,
) -> list[SystemFigures]:
    """Figures of every system; videos are kept in `out` and made again only for other settings.

    Args:
        by_seed: for each seed the full teacher, the same at few steps, and the student.
        bench: how much to measure.
        world: whose held-out prompts are shown.
        out: folder of the benchmark.
    """
    systems = by_seed[0]
    config = read_model_config(systems[0].model)
    fps = config.fps
    buffer = config.model.buffer_frames * config.autoencoder.temporal_factor
    prompts = held_out_prompts(world)
    if not prompts:
        raise UserError("world.held_out=0 leaves no prompt to measure on; hold some out")
    short, long = prompts[: bench.prompts], prompts[: bench.drift_prompts]
    longest = max(bench.drift_buffers) * buffer + bench.frames
    videos = {}
    wanted = [
        (place, system, seed, chosen, frames)
        for seed, seeded in enumerate(by_seed)
        for place, system in enumerate(seeded)
        for chosen, frames in ((short, bench.frames), (long, longest))
    ]
    with progress("videos", unit="sets") as shown:
        for done, (place, system, seed, chosen, frames) in enumerate(wanted):
            shown(done, len(wanted), {})
            videos[place, seed, frames] = _videos(system, seed, chosen, frames, out)
        shown(len(wanted), len(wanted), {})
    figures = []
    costs = stream_costs(systems, short[0], len(by_seed), fps)
    for place, system in enumerate(systems):
        seeds = range(len(by_seed))
        first = [videos[place, seed, bench.frames] for seed in seeds]
        ends = [videos[place, seed, longest] for seed in seeds]
        best = [videos[0, seed, bench.frames] for seed in seeds]
        drift = {
            buffers: [
                _marks_from(video, buffers * buffer, bench.frames, long, fps) for video in ends
            ]
            for buffers in bench.drift_buffers
        }
        figures.append(
            SystemFigures(
                label=system.label,
                right=merge_seeds([marks_by_axis(made, short, fps) for made in first]),
                same=[
                    agreement_marks(made, other, fps)
                    for made, other in zip(first, best, strict=True)
                ],
                drift=drift,
                flicker=[background_flicker(made) for made in first],
                evaluations_per_second=costs[system.label][0],
                wall_per_second=costs[system.label][1],
            )
        )
    return figures


def _marks_from(
    videos: np.ndarray, first: int, frames: int, prompts: Sequence[SpritePrompt], fps: float
) -> list[float]:
    """Share of the axes that each video has right in the frames from `first` on."""
    return mean_marks(marks_by_axis(videos[:, first : first + frames], prompts, fps))


def _videos(
    system: System, seed: int, prompts: Sequence[SpritePrompt], frames: int, out: Path
) -> np.ndarray:
    """Videos of one system and seed, on Ray; the noise depends on seed and prompt alone."""
    from jobs.evaluate import cached_videos, generate_videos

    captions = [prompt.caption() for prompt in prompts]
    key: dict[str, Any] = {
        "weights": read_model_config(system.model).weights_sha256,
        "sampling": system.sampling.model_dump(),
        "prompts": captions,
        "frames": frames,
        "seed": seed,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cached_videos(
        out / "videos" / f"{name}.npz",
        key,
        lambda: generate_videos(
            system.model, system.sampling, captions, seed * SEED_STRIDE, frames, BATCH
        ),
    )


def report(
    figures: Sequence[SystemFigures],
    bench: SpriteBenchConfig,
    pairs: Sequence[SpriteModels],
    out: Path,
    made: bool,
) -> None:
    """Write text, figures and plot, and show the text.

    Args:
        figures: of the three systems.
        bench: how much was measured.
        pairs: the models; one, or one for each seed.
        out: folder of the benchmark.
        made: whether the benchmark made the models.
    """
    stages = json.loads((out / STAGES_FILE).read_text()) if made else {}
    text = markdown(figures, describe(figures, bench, len(pairs), made, sum(stages.values())))
    (out / "report.md").write_text(f"# Sprite benchmark\n\n![](report.svg)\n\n{text}")
    record = {
        "settings": bench.model_dump(mode="json"),
        "models": [
            {
                "teacher": read_model_config(pair.teacher).weights_sha256,
                "student": read_model_config(pair.student).weights_sha256,
            }
            for pair in pairs
        ],
        "stage_seconds": stages,
        "verdicts": [one.model_dump(mode="json") for one in verdicts(figures)],
        "systems": [one.model_dump(mode="json") for one in figures],
    }
    (out / "report.json").write_text(json.dumps(record) + "\n")
    (out / "scores.json").write_text(json.dumps(_scores(figures[-1]), indent=2) + "\n")
    plot(figures, out / "report.svg")
    typer.echo(text)
    say(f"report: {out / 'report.md'}")


def _scores(student: SystemFigures) -> dict[str, float]:
    """What the student reached on average, as `streamdit register --scores` takes it."""
    right = {axis: statistics.fmean(values) for axis, values in student.accuracy.items()}
    return {
        **right,
        "same_as_teacher": statistics.fmean(student.agreement),
        "flicker": statistics.fmean(student.flicker),
    }


def describe(
    figures: Sequence[SystemFigures],
    bench: SpriteBenchConfig,
    trainings: int,
    made: bool,
    stage_seconds: float,
) -> list[str]:
    """What was measured on what, and what the intervals stand for.

    Args:
        figures: of the three systems.
        bench: how much was measured.
        trainings: pairs of models.
        made: whether the benchmark made the models.
        stage_seconds: how long that took.
    """
    prompts, seeds = len(figures[0].same[0]), len(figures[0].same)
    long = len(next(iter(figures[0].drift.values()))[0]) if figures[0].drift else 0
    measured = (
        f"{prompts} prompts whose combination training never showed, {bench.frames} frames of each "
        f"from the start of its stream; drift on {long} of the prompts. The systems share prompts "
        "and noise. Wall times are of one stream alone, decoding included, the systems taking "
        "turns in one process."
    )
    if seeds == 1:
        sure = "One seed, one round of timing: single values."
    else:
        rounds = f"those of wall times over {seeds} rounds of timing"
        if trainings == 1:
            sure = f"{seeds} seeds of noise on one training; the intervals are of noise only, "
        else:
            kinds = "training, distillation and noise" if made else "noise on as many trainings"
            sure = f"{seeds} seeds of {kinds}"
            sure += ", on one world, data set and autoencoder; " if made else "; "
            sure += "the intervals are over the seeds, "
        sure += (
            f"{rounds}. They are 95 %, by Student's t; a share's is at least as wide as that of "
            "all its videos taken together."
        )
    paragraphs = [measured, sure]
    if made:
        took = format_duration(stage_seconds)
        paragraphs.append(f"Making the models, from the world to the last student, took {took}.")
    return paragraphs
