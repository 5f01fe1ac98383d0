"""What the demo found, laid out as its summary page."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from distillation.config import DistillConfig
from evaluation.charts import Chart, Series
from evaluation.report import (
    Clip,
    Command,
    Fact,
    Metric,
    ModelScores,
    Place,
    RunSummary,
    Sample,
    SampleGroup,
    SampleRow,
    ScoreTable,
    Stage,
    StreamedVideo,
    TimedPrompt,
    duration,
    save_media,
    write_summary,
)
from evaluation.sheets import read_video
from evaluation.sprite_score import summarise
from evaluation.sprites import SpriteWorldConfig, plan_world
from jobs.evaluate import ScoredVideo
from pipeline.curate import CurateSummary
from streamdit.config import SamplingConfig
from streamdit.partition import PartitionScheme
from training.autoencoder import AutoencoderTrainSummary
from training.config import TrainConfig
from training.metrics import read_metrics
from training.registry import RegisteredVersion
from training.revision import git_revision

METRICS = [
    Metric(key="colour", label="Colour", minimum=0.8, chance=1 / 6),
    Metric(key="background", label="Background", minimum=0.8, chance=1 / 4),
    Metric(key="direction", label="Direction", minimum=0.4, chance=1 / 4),
    Metric(key="shape", label="Shape", chance=1 / 3),
    Metric(
        key="area_ratio_mean", label="Area ÷ true area", percent=False, minimum=0.5, maximum=2.0
    ),
]
ATTRIBUTES = ("colour", "shape", "direction", "background")
SHOWN_INPUTS = 6
SHOWN_PROMPTS = 6
UPSCALE = 3


@dataclass(frozen=True)
class SystemResult:
    """One way of sampling one model, and how it scored."""

    name: str
    label: str
    sampling: SamplingConfig
    videos: list[ScoredVideo]

    @property
    def summary(self) -> dict[str, float]:
        """Accuracies and area ratios over all prompts."""
        return summarise([video.score for video in self.videos])

    def evaluations_per_chunk(self) -> int:
        """Network evaluations per emitted chunk; guidance doubles them."""
        return self.sampling.micro_steps * (1 if self.sampling.guidance_scale == 1.0 else 2)


@dataclass(frozen=True)
class DemoResults:
    """Everything that the page shows."""

    videos: Sequence[Path]
    curated: CurateSummary
    autoencoder: AutoencoderTrainSummary
    systems: Sequence[SystemResult]
    registered: RegisteredVersion
    stream: np.ndarray
    stream_prompts: Sequence[str]
    stream_seconds: float
    stage_seconds: dict[str, float]
    world: SpriteWorldConfig
    train: TrainConfig
    distill: DistillConfig
    mlflow_command: str


def write_page(out: Path, results: DemoResults) -> Path:
    """Write `summary.html` and its media into `out`."""
    shutil.rmtree(out / "media", ignore_errors=True)
    student = results.systems[-1]
    passed = all(metric.passes(student.summary[metric.key]) is not False for metric in METRICS)
    scheme = PartitionScheme.from_sampling(results.train.model.buffer_frames, student.sampling)
    summary = RunSummary(
        title="StreamDiT demo",
        lead=(
            f"From {len(results.videos)} video files to a registered model that streams: the "
            f"distilled model takes {student.evaluations_per_chunk()} evaluation per chunk and "
            f"{'meets' if passed else 'misses some of'} the thresholds on "
            f"{len(student.videos)} prompts that training never showed."
        ),
        facts=_facts(results, scheme),
        inputs=_inputs(out, results),
        stream=_stream(out, results),
        groups=[_samples(out, results.systems, results.world.fps)],
        scores=_scores(results.systems),
        charts=_charts(out),
        stages=[
            Stage(name=name.split(" ", 1)[1], seconds=seconds)
            for name, seconds in results.stage_seconds.items()
        ],
        places=[
            Place(label="Videos made for the demo", path="world"),
            Place(label="Dataset of latents", path="dataset"),
            Place(label="Autoencoder", path="autoencoder"),
            Place(label="Teacher", path="teacher/model"),
            Place(label="Distilled model", path="student/model"),
            Place(label="Streamed video", path="stream.mp4"),
            Place(label="Contact sheet", path="contact-sheet.png"),
            Place(label="MLflow store", path="mlflow"),
        ],
        commands=[
            Command(purpose="Open the MLflow UI", line=results.mlflow_command),
            Command(
                purpose="Stream from the registered model",
                line=f"MLFLOW_TRACKING_URI={results.registered.tracking_uri} streamdit generate "
                f'{results.registered.uri} --prompt "{results.stream_prompts[0]}" '
                "--out again.mp4",
            ),
        ],
        reproducibility=_reproducibility(results),
    )
    return write_summary(out, summary)


def _facts(results: DemoResults, scheme: PartitionScheme) -> list[Fact]:
    parameters = _parameters(results)
    rate = len(results.stream) / results.stream_seconds
    return [
        Fact(label="Parameters", value=f"{parameters / 1e6:.1f} M"),
        Fact(label="Clips", value=f"{results.curated.clips:,}"),
        Fact(label="Autoencoder", value=f"{results.autoencoder.psnr:.1f} dB PSNR"),
        Fact(
            label="Student's scheme", value=f"K={scheme.K} N={scheme.N} c={scheme.c} s={scheme.s}"
        ),
        Fact(label="Streaming", value=f"{rate:.0f} frames/s"),
        Fact(label="Work", value=duration(sum(results.stage_seconds.values()))),
    ]


def _parameters(results: DemoResults) -> int:
    import torch

    from streamdit.model import StreamDiT

    with torch.device("meta"):
        model = StreamDiT(results.train.model)
    return sum(parameter.numel() for parameter in model.parameters())


def _inputs(out: Path, results: DemoResults) -> list[Clip]:
    """The first shot of the first few videos."""
    clips = []
    plan = plan_world(results.world)
    for number, path in enumerate(results.videos[:SHOWN_INPUTS]):
        shot = plan[number][0]
        frames = read_video(path)[: shot.frames]
        media = save_media(out, f"media/input-{number}", frames, results.world.fps)
        clips.append(Clip(media=media, caption=shot.prompt.caption()))
    return clips


def _stream(out: Path, results: DemoResults) -> StreamedVideo:
    fps = results.world.fps
    share = len(results.stream) / len(results.stream_prompts) / fps
    rate = len(results.stream) / results.stream_seconds
    # A frame from the middle of the first prompt: the very middle is where the prompt changes.
    poster = len(results.stream) // (2 * len(results.stream_prompts))
    return StreamedVideo(
        media=save_media(out, "media/stream", results.stream, fps, UPSCALE + 1, poster),
        seconds=len(results.stream) / fps,
        prompts=[
            TimedPrompt(start=index * share, text=prompt)
            for index, prompt in enumerate(results.stream_prompts)
        ],
        facts=[
            Fact(label="Streamed from", value=results.registered.uri),
            Fact(label="Speed", value=f"{rate:.0f} frames/s on the CPU, shown at {fps:g}"),
        ],
    )


def _samples(out: Path, systems: Sequence[SystemResult], fps: float) -> SampleGroup:
    """The same prompts and the same noise, side by side."""
    rows = []
    for index in range(min(SHOWN_PROMPTS, len(systems[0].videos))):
        samples = []
        for system in systems:
            video = system.videos[index]
            name = f"media/{system.name}-{index}"
            marks = {attribute: getattr(video.score, attribute) for attribute in ATTRIBUTES}
            media = save_media(out, name, video.frames, fps, upscale=UPSCALE)
            samples.append(Sample(media=media, marks=marks))
        rows.append(SampleRow(prompt=systems[0].videos[index].prompt.caption(), samples=samples))
    columns = [
        f"{system.label} ({system.evaluations_per_chunk()} "
        f"evaluation{'s' if system.evaluations_per_chunk() > 1 else ''} per chunk)"
        for system in systems
    ]
    return SampleGroup(
        title="Samples",
        lead="Prompts that training never showed, each from the same noise in every column.",
        columns=columns,
        rows=rows,
    )


def _scores(systems: Sequence[SystemResult]) -> ScoreTable:
    keys = [metric.key for metric in METRICS]
    return ScoreTable(
        lead=f"{len(systems[0].videos)} prompts, judged by the exact scorer of the sprite world.",
        metrics=METRICS,
        models=[
            ModelScores(
                model=system.label,
                values={key: system.summary[key] for key in keys},
                judged=system is systems[-1],
            )
            for system in systems
        ],
    )


def _charts(out: Path) -> list[Chart]:
    charts = []
    for title, folder in (("Training the teacher", "teacher"), ("Distillation", "student")):
        rows = list(read_metrics(out / folder / "metrics.jsonl"))
        series = []
        for name, key in (("training", "loss"), ("held-out clips", "validation_loss")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                series.append(Series(name=name, steps=list(steps), values=list(values)))
        if series:
            charts.append(Chart(title=title, series=series))
    return charts


def _reproducibility(results: DemoResults) -> list[Fact]:
    libraries = ("torch", "ray", "deepspeed", "mlflow", "pyarrow")
    facts = [Fact(label=name, value=metadata.version(name)) for name in libraries]
    facts += [
        Fact(label="Python", value=platform.python_version()),
        Fact(label="Seed of the world", value=str(results.world.seed)),
        Fact(label="Seed of training", value=str(results.train.seed)),
        Fact(label="Seed of distillation", value=str(results.distill.seed)),
    ]
    revision = git_revision()
    return facts + ([Fact(label="Git revision", value=revision[:12])] if revision else [])
