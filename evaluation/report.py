"""The HTML summary of a run: one page with everything that a person wants to see of it.

:class:`RunSummary` holds what is shown, :func:`write_summary` writes the page. The page is one
file with inline style and charts; videos and posters lie beside it and are linked relatively, so
the folder can be moved or sent as a whole.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evaluation.charts import Chart, line_chart
from evaluation.sheets import write_still, write_video
from streamdit.errors import UserError


class Shown(BaseModel):
    """Base of everything on the page: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Media(Shown):
    """A video on disk with the picture that stands in for it; paths relative to the page."""

    video: str
    """The mp4."""
    poster: str
    """A PNG, shown until the video plays and where it cannot."""
    width: int = Field(gt=0)
    """Pixels."""
    height: int = Field(gt=0)
    """Pixels."""


class Fact(Shown):
    """A labelled value."""

    label: str
    value: str


class Clip(Shown):
    """An input video with its caption."""

    media: Media
    caption: str


class Sample(Shown):
    """A generated video and what it got right."""

    media: Media
    marks: dict[str, bool] = {}
    """Attribute → whether it is right."""


class SampleRow(Shown):
    """Videos of several models for one prompt."""

    prompt: str
    samples: list[Sample]
    """One per column of the group."""


class SampleGroup(Shown):
    """Models side by side: a column per model, a row per prompt."""

    title: str
    lead: str = ""
    columns: list[str]
    rows: list[SampleRow]

    @model_validator(mode="after")
    def _check_columns(self) -> SampleGroup:
        for row in self.rows:
            if len(row.samples) != len(self.columns):
                raise ValueError(
                    f"row {row.prompt!r} has {len(row.samples)} samples for "
                    f"{len(self.columns)} columns; give one per column"
                )
        return self


class TimedPrompt(Shown):
    """A prompt and when, in seconds of the streamed video, it begins to steer."""

    start: float = Field(ge=0)
    text: str


class StreamedVideo(Shown):
    """A video that was streamed while its prompt changed."""

    media: Media
    seconds: float = Field(gt=0)
    prompts: list[TimedPrompt] = Field(min_length=1)
    facts: list[Fact] = []

    @model_validator(mode="after")
    def _check_times(self) -> StreamedVideo:
        starts = [prompt.start for prompt in self.prompts]
        if starts != sorted(starts) or starts[-1] >= self.seconds:
            raise ValueError(
                f"prompts start at {starts} in a video of {self.seconds} seconds; give ascending "
                "times within it"
            )
        return self

    def spans(self) -> list[tuple[TimedPrompt, float]]:
        """Each prompt with the seconds for which it holds."""
        ends = [prompt.start for prompt in self.prompts[1:]] + [self.seconds]
        return [
            (prompt, end - prompt.start) for prompt, end in zip(self.prompts, ends, strict=True)
        ]


class Metric(Shown):
    """A column of the score table."""

    key: str
    label: str
    percent: bool = True
    """Shown as per cent of one, else as a factor."""
    minimum: float | None = None
    """Smallest value that passes."""
    maximum: float | None = None
    """Largest value that passes."""
    chance: float | None = None
    """What guessing would score."""

    def written(self, value: float) -> str:
        """The value as text."""
        return f"{100 * value:.0f}\u00a0%" if self.percent else f"{value:.2f}×"

    def target(self) -> str:
        """The stated threshold as text; empty without one."""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.written(self.minimum)} to {self.written(self.maximum)}"
        if self.minimum is not None:
            return f"at least {self.written(self.minimum)}"
        return "" if self.maximum is None else f"at most {self.written(self.maximum)}"

    def passes(self, value: float) -> bool | None:
        """Whether the value meets the threshold; None without one."""
        if self.minimum is None and self.maximum is None:
            return None
        above = self.minimum is None or value >= self.minimum
        return above and (self.maximum is None or value <= self.maximum)


class ModelScores(Shown):
    """A row of the score table."""

    model: str
    values: dict[str, float]
    """Metric key → value; a missing one is shown as a dash."""
    judged: bool = False
    """Whether the thresholds are meant for this model."""


class ScoreTable(Shown):
    """Scores of the models."""

    lead: str = ""
    metrics: list[Metric]
    models: list[ModelScores]

    def scale(self, metric: Metric) -> float:
        """The value of a full bar: one for per cent, else the largest value or threshold."""
        if metric.percent:
            return 1.0
        values = [model.values.get(metric.key, 0.0) for model in self.models]
        return max([*values, metric.maximum or 0.0, metric.minimum or 0.0, 1.0])


class Stage(Shown):
    """A stage of the run and how long it worked."""

    name: str
    seconds: float = Field(ge=0)
    note: str = ""


class Place(Shown):
    """Where something lies, relative to the page's folder where it can be."""

    label: str
    path: str


class Command(Shown):
    """A command line to copy, and what it does."""

    purpose: str
    line: str


class RunSummary(Shown):
    """Everything on the page, in its order. Empty parts are left out."""

    title: str
    lead: str
    """One sentence: what was done and how it came out."""
    facts: list[Fact] = []
    inputs: list[Clip] = []
    stream: StreamedVideo | None = None
    groups: list[SampleGroup] = []
    scores: ScoreTable | None = None
    charts: list[Chart] = []
    stages: list[Stage] = []
    places: list[Place] = []
    commands: list[Command] = []
    reproducibility: list[Fact] = []

    def media(self) -> list[Media]:
        """Every video that the page links."""
        samples = [s for group in self.groups for row in group.rows for s in row.samples]
        found = [clip.media for clip in self.inputs] + [sample.media for sample in samples]
        return found + ([self.stream.media] if self.stream else [])


def save_media(
    folder: Path | str,
    name: str,
    frames: np.ndarray,
    fps: float,
    upscale: int = 1,
    poster_frame: int | None = None,
) -> Media:
    """Write frames as `name`.mp4 and `name`.png below the page's folder.

    Args:
        folder: where the page will lie.
        name: path below it without suffix, such as `samples/teacher-03`.
        frames: uint8 `[n, H, W, 3]`.
        fps: frames per second.
        upscale: whole factor of nearest-neighbour enlargement.
        poster_frame: index of the frame that becomes the still; default: the middle one.
    """
    target = Path(folder) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    video, poster = (PurePosixPath(f"{name}{suffix}") for suffix in (".mp4", ".png"))
    write_video(Path(folder) / video, frames, fps, upscale)
    # The middle frame tells more than the first, which a stream may still be warming up in.
    still = frames[len(frames) // 2 if poster_frame is None else poster_frame]
    write_still(Path(folder) / poster, still, upscale)
    return Media(
        video=str(video),
        poster=str(poster),
        width=frames.shape[2] * upscale,
        height=frames.shape[1] * upscale,
    )


def duration(seconds: float) -> str:
    """Seconds in words: `8.4 s`, `4 min 12 s`, `1 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def write_summary(folder: Path | str, summary: RunSummary) -> Path:
    """Write `summary.html` into `folder`, where the media of the summary already lie.

    Returns:
        The page.

    Raises:
        UserError: if a video or poster that the page links is not below `folder`.
    """
    import jinja2

    folder = Path(folder)
    for media in summary.media():
        _check_linked(folder, media.video)
        _check_linked(folder, media.poster)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    html = environment.get_template("summary.html").render(
        summary=summary,
        charts=[(chart, line_chart(chart)) for chart in summary.charts],
        linked={place.path for place in summary.places if _is_below(folder, place.path)},
    )
    page = folder / "summary.html"
    partial = page.with_suffix(".html.partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, page)
    return page


def _is_below(folder: Path, path: str) -> bool:
    """Whether a relative path names something that exists inside the folder."""
    target = (folder / path).resolve()
    return (
        not Path(path).is_absolute() and target.is_relative_to(folder.resolve()) and target.exists()
    )


def _check_linked(folder: Path, path: str) -> None:
    if not _is_below(folder, path):
        raise UserError(
            f"{path}: not found inside {folder}, so the summary cannot link it; write it there "
            "with save_media and give its relative path"
        )
