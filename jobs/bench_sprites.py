"""`streamdit bench sprites`: what distillation keeps, where the right answer is known."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydantic import Field

from evaluation.sprite_benchmark import (
    AXES,
    SystemFigures,
    accuracies,
    agreement,
    background_flicker,
    markdown,
    merge_seeds,
    plot,
)
from evaluation.sprites import SpritePrompt, SpriteWorldConfig, held_out_prompts
from jobs.config import load_config
from jobs.console import progress, say
from jobs.evaluate import stream_batch
from jobs.options import ConfigFile, Overrides
from jobs.runtime import ray_runtime
from jobs.sprite_models import SpriteModels, StageClock, make_sprite_data, train_sprite_models
from streamdit.config import SamplingConfig, StreamDiTConfig, StrictModel
from streamdit.errors import UserError
from streamdit.io import StreamingModel, read_model_config
from training.config import TrackingConfig

BATCH = 8
SEED_STRIDE = 100_000
TIMED_FRAMES = 64


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
    drift_buffers: tuple[int, ...] = (1, 4, 16)
    """Buffer lengths after the start at which long streams are read again."""
    seeds: int = Field(default=3, gt=0)
    """Each gives one value, and intervals are over them: seeds of training, distillation and noise
    where the models are made, of the noise alone where they are given."""


@dataclass(frozen=True)
class System:
    """A model and how it is sampled."""

    label: str
    model: str
    sampling: SamplingConfig


def command(
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Models, report and plot go here.")
    ] = Path("runs/bench-sprites"),
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME", help="demo (two CPU cores) or large (GPU).")
    ] = "demo",
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", metavar="MODEL_DIR", help="Teacher; default: train one."),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option("--student", metavar="MODEL_DIR", help="Its student; default: distil one."),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Compare teacher and student on a made-up world whose videos can be marked exactly.

    The full teacher (its 128 steps with guidance), the same teacher at the student's few steps
    without guidance (what one would get without distilling), and the student make videos from the
    same prompts and noise. Writes OUT/report.md, report.json and report.svg. Can be interrupted:
    finished models and videos are kept.

    KEY=VALUE sets the benchmark's own keys (`prompts=16`, `seeds=2`) or those of a stage
    (`train.steps=200`).
    """
    own = [text for text in overrides or () if text.split("=")[0] in SpriteBenchConfig.model_fields]
    bench = load_config(SpriteBenchConfig, stage="bench", preset=preset, file=config, overrides=own)
    if (teacher is None) != (student is None):
        raise UserError("--teacher and --student belong together; give both, or none")
    stages = [text for text in overrides or () if text not in own]
    out.mkdir(parents=True, exist_ok=True)
    with ray_runtime():
        if teacher is None or student is None:
            pairs, world = _make_models(bench, stages, out)
        elif stages:
            raise UserError(f"{stages[0]} sets how models are made, but both models are given")
        else:
            pairs, world = [SpriteModels(teacher, student)], SpriteWorldConfig()
        systems = [plan_systems(pair.teacher, pair.student) for pair in pairs]
        figures = measure(systems * (bench.seeds // len(pairs)), bench, world, out)
    report(figures, bench, pairs, out)


def _make_models(
    bench: SpriteBenchConfig, overrides: Sequence[str], out: Path
) -> tuple[list[SpriteModels], SpriteWorldConfig]:
    """A teacher and its student for every seed, on one data set; finished ones are kept."""
    from jobs.demo import DemoSettings

    sections = ("ingest", "autoencoder", "train", "distill")
    settings = load_config(
        DemoSettings,
        stage="demo",
        preset=bench.models,
        overrides=[*bench.changes, *overrides],
        sections=sections,
    )
    tracking = TrackingConfig(directory=str(out / "mlflow"), experiment="streamdit-bench-sprites")
    clock = StageClock(out / "stage-seconds.json", stages=4 + 2 * bench.seeds)
    data = make_sprite_data(settings, out, tracking, clock)
    pairs = [
        train_sprite_models(settings, data.dataset, out / f"seed-{seed}", tracking, clock, seed)
        for seed in range(bench.seeds)
    ]
    return pairs, settings.world


def plan_systems(teacher: Path, student: Path) -> list[System]:
    """Full teacher, undistilled teacher at the student's steps, student; on the same buffer.

    Raises:
        UserError: if the student is not distilled, or from another teacher.
    """
    config, parent = read_model_config(student), read_model_config(teacher)
    record = config.distilled
    if record is None or record.teacher_sha256 != parent.weights_sha256:
        raise UserError(
            f"{student} was not distilled from {teacher}; give a student and its own teacher"
        )
    few = config.sampling
    full = few.model_copy(
        update={
            "micro_steps": record.teacher_micro_steps,
            "guidance_scale": record.teacher_guidance_scale,
        }
    )
    steps = _steps(config, few)
    return [
        System(
            f"teacher, {_steps(config, full)} steps, guidance {full.guidance_scale:g}",
            str(teacher),
            full,
        ),
        System(f"teacher, {steps} steps, no guidance", str(teacher), few),
        System(f"student, {steps} steps", str(student), few),
    ]


def _steps(config: StreamDiTConfig, sampling: SamplingConfig) -> int:
    """Denoising steps of a frame, T."""
    chunks = (config.model.buffer_frames - sampling.reference_frames) // sampling.chunk_frames
    return chunks * sampling.micro_steps


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
        (system, seed, chosen, frames)
        for seed, seeded in enumerate(by_seed)
        for system in seeded
        for chosen, frames in ((short, bench.frames), (long, longest))
    ]
    with progress("videos", unit="sets") as shown:
        for done, (system, seed, chosen, frames) in enumerate(wanted):
            shown(done, len(wanted), {})
            videos[system.label, seed, frames] = _videos(system, seed, chosen, frames, out)
        shown(len(wanted), len(wanted), {})
    figures = []
    costs = _costs(systems, short[0], len(by_seed), fps)
    for system in systems:
        seeds = range(len(by_seed))
        first = [videos[system.label, seed, bench.frames] for seed in seeds]
        ends = [videos[system.label, seed, longest] for seed in seeds]
        best = [videos[systems[0].label, seed, bench.frames] for seed in seeds]
        drift = {
            buffers: [
                _mean_accuracy(video, buffers * buffer, bench.frames, long, fps) for video in ends
            ]
            for buffers in bench.drift_buffers
        }
        figures.append(
            SystemFigures(
                label=system.label,
                accuracy=merge_seeds([accuracies(made, short, fps) for made in first]),
                flicker=[background_flicker(made) for made in first],
                agreement=[
                    agreement(made, other, fps) for made, other in zip(first, best, strict=True)
                ],
                drift=drift,
                evaluations_per_second=costs[system.label][0],
                wall_per_second=costs[system.label][1],
            )
        )
    return figures


def _mean_accuracy(
    videos: np.ndarray, first: int, frames: int, prompts: Sequence[SpritePrompt], fps: float
) -> float:
    """Accuracy over all axes of the frames from `first` on."""
    right = accuracies(videos[:, first : first + frames], prompts, fps)
    return sum(right[axis] for axis in AXES) / len(AXES)


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


def _costs(
    systems: Sequence[System], prompt: SpritePrompt, rounds: int, fps: float
) -> dict[str, tuple[float, list[float]]]:
    """Evaluations and wall times per second of video of one stream; the systems take turns.

    Both are of the steady state: what twice as much video costs, less what once as much does.
    """
    import streamdit

    models = {system.label: streamdit.load(system.model) for system in systems}
    per_second = fps / TIMED_FRAMES
    evaluations = {}
    for system in systems:
        once, twice = (
            count_evaluations(models[system.label], system, prompt, frames)
            for frames in (TIMED_FRAMES, 2 * TIMED_FRAMES)
        )
        evaluations[system.label] = (twice - once) * per_second
    seconds: dict[str, list[float]] = {system.label: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            once, twice = (
                _time_stream(models[system.label], system, prompt, frames)
                for frames in (TIMED_FRAMES, 2 * TIMED_FRAMES)
            )
            seconds[system.label].append((twice - once) * per_second)
    return {label: (evaluations[label], seconds[label]) for label in evaluations}


def count_evaluations(
    model: StreamingModel, system: System, prompt: SpritePrompt, frames: int
) -> int:
    """Evaluations of a stream, as a hook on the network sees them; a batch row is one."""
    rows: list[int] = []
    hook = model.model.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    try:
        stream_batch(model, system.sampling, [prompt.caption()], [0], frames, plain=True)
    finally:
        hook.remove()
    return sum(rows)


def _time_stream(model: StreamingModel, system: System, prompt: SpritePrompt, frames: int) -> float:
    """Seconds that a stream takes, decoding included."""
    started = time.perf_counter()
    stream_batch(model, system.sampling, [prompt.caption()], [0], frames)
    return time.perf_counter() - started


def report(
    figures: Sequence[SystemFigures],
    bench: SpriteBenchConfig,
    pairs: Sequence[SpriteModels],
    out: Path,
) -> None:
    """Write table, figures and plot, and show the table."""
    kinds = "training, distillation and noise" if len(pairs) > 1 else "noise"
    about = (
        f"{bench.prompts} prompts whose combination training never showed, {bench.seeds} seeds of "
        f"{kinds}, {bench.frames} frames each; drift on {bench.drift_prompts} of the prompts. "
        "Intervals are 95 % over the seeds (Student's t); systems share prompts and noise. Wall "
        "times are of one stream, the systems taking turns in one process."
    )
    text = markdown(figures, about)
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
        "systems": [one.model_dump(mode="json") for one in figures],
    }
    (out / "report.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(figures, out / "report.svg")
    typer.echo(text)
    say(f"report: {out / 'report.md'}")
