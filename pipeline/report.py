"""The HTML page of a dataset: one file with everything that a person wants to see of it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.overview import Overview, StageState
from pipeline.pictures import STRIP_FRAMES, clip_frames, data_url, strip
from pipeline.reselect import Clause, preview
from streamdit.errors import UserError

DECILES = 10
EXAMPLES = 12
BINS = 40
PICTURE_HEIGHT = 96
RESOLUTIONS = 6
INK, MUTED = "#010203", "#040506"
COLOURS = {INK: "var(--kept)", MUTED: "var(--left)"}
"""matplotlib draws with placeholders, so that one chart fits a light and a dark page."""

STAGE_WORK = {
    "curate": (("sources", "videos"), ("clips", "clips"), ("dead", "dead")),
    "annotate": (("clips", "clips"), ("captions", "captions"), ("dead", "dead")),
    "latents": (("clips", "clips"), ("dead", "dead")),
    "text": (("texts", "captions"),),
}
"""Counters of each stage that are shown, with their names."""


@dataclass(frozen=True)
class ScoreSheet:
    """One score: its distribution, and a clip out of each tenth."""

    name: str
    chart: str
    """SVG."""
    thresholds: str
    pictures: list[tuple[str, str]]
    """Value and picture of each tenth, from the lowest."""


@dataclass(frozen=True)
class Example:
    """A clip as a strip of frames."""

    strip: str
    caption: str
    note: str


def write_report(
    overview: Overview, path: Path, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write the page of a dataset; clips are decoded for its pictures.

    Args:
        overview: what to show.
        path: the HTML file.
        on_progress: called with parts done and parts in all.

    Returns:
        `path`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": lambda value: f"{value:,.0f}", "size": human_bytes}
    pictures = _Pictures(overview)
    total = len(overview.scores) + 1
    sheets = []
    for done, name in enumerate(overview.scores):
        sheets.append(_score_sheet(overview, name, pictures))
        if on_progress:
            on_progress(done + 1, total)
    page = environment.get_template("dataset.html").render(
        overview=overview,
        facts=_facts(overview),
        stages=[(stage, _work(stage)) for stage in overview.stages],
        clauses=_clauses(overview),
        buckets=_bucket_rows(overview),
        resolutions=_resolutions(overview),
        durations=_durations(overview),
        sheets=sheets,
        examples=_examples(overview, pictures),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    if on_progress:
        on_progress(total, total)
    return path


def human_bytes(count: float) -> str:
    """`512 B`, `3.4 MB`: decimal units."""
    for name in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {name}" if name == "B" or count >= 99.5 else f"{count:.1f} {name}"
        count /= 1000
    return f"{count:,.1f} TB"


def hours(seconds: float) -> str:
    """Seconds as a time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


class _Pictures:
    """Frames of clips, each video read once at most for what is shown of it."""

    def __init__(self, overview: Overview) -> None:
        self.clips = overview.clips.select(["clip_id", "uri", "start_s", "end_s"])
        self.stills: dict[int, str | None] = {}

    def still(self, index: int) -> str | None:
        """The middle frame of a clip."""
        if index not in self.stills:
            frames = clip_frames(self._row(index), 1, PICTURE_HEIGHT)
            self.stills[index] = data_url(frames[0]) if frames else None
        return self.stills[index]

    def strip(self, index: int) -> str | None:
        """A clip played out."""
        frames = clip_frames(self._row(index), STRIP_FRAMES, PICTURE_HEIGHT)
        return data_url(strip(frames)) if frames else None

    def _row(self, index: int) -> dict[str, Any]:
        return self.clips.slice(index, 1).to_pylist()[0]


def _facts(overview: Overview) -> list[tuple[str, str]]:
    facts = [
        ("videos", f"{len(overview.sources):,}"),
        ("of video", hours(overview.video_s)),
        ("clips", f"{len(overview.clips):,}"),
    ]
    if overview.selected is not None and overview.manifest is not None:
        splits = Counter(overview.selected["split"].to_pylist())
        facts += [
            ("selected", f"{len(overview.selected):,}"),
            ("held out", f"{splits['held_out']:,}"),
            ("latents", human_bytes(overview.bytes.get("latents", 0))),
        ]
    return [*facts, ("dead letters", f"{sum(reason.count for reason in overview.dead):,}")]


def _work(stage: StageState) -> str:
    shown = [(stage.counters.get(key, 0), name) for key, name in STAGE_WORK[stage.name]]
    return ", ".join(f"{count:,.0f} {name}" for count, name in shown)


def _clauses(overview: Overview) -> tuple[Clause, ...]:
    """What each condition of the selection drops, once there is one."""
    if overview.manifest is None:
        return ()
    try:
        return preview(overview.root, overview.manifest.selection.expression).clauses
    except UserError:  # further videos are on their way, and not annotated yet
        return ()


def _bucket_rows(overview: Overview) -> list[tuple[str, int, int]]:
    """Bucket, its clips, and how many of them are selected."""
    selected = (
        Counter() if overview.selected is None else Counter(overview.selected["bucket"].to_pylist())
    )
    return [(name, count, selected[name]) for name, count in overview.buckets.most_common()]


def _resolutions(overview: Overview) -> list[tuple[str, int]]:
    sizes = zip(
        overview.sources["width"].to_pylist(), overview.sources["height"].to_pylist(), strict=True
    )
    return Counter(f"{width}×{height}" for width, height in sizes).most_common(RESOLUTIONS)


def _durations(overview: Overview) -> str:
    values = overview.sources["duration_s"].to_numpy()
    return histogram(values, np.ones(len(values), bool), [], "seconds per video")


def _score_sheet(overview: Overview, name: str, pictures: _Pictures) -> ScoreSheet:
    values = np.asarray(overview.clips[name], float)  # what was not measured becomes NaN
    limits = overview.thresholds(name)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    middles = (np.arange(DECILES) + 0.5) / DECILES * len(order)
    tenths = dict.fromkeys(order[middles.astype(int)].tolist())
    if len(set(values[order].tolist())) == 1:
        tenths = dict.fromkeys([int(order[0])])  # one value: no tenth differs from another
    shown = [(i, pictures.still(i)) for i in tenths]
    return ScoreSheet(
        name=name,
        chart=histogram(values, overview.kept, limits, ""),
        thresholds=", ".join(f"{limit:g}" for limit in limits),
        pictures=[(f"{values[i]:.4g}", picture) for i, picture in shown if picture],
    )


def histogram(values: np.ndarray, kept: np.ndarray, limits: list[float], label: str) -> str:
    """Distribution of `values [n]` as SVG: those kept over all, with lines at the limits."""
    from matplotlib.figure import Figure

    finite = np.isfinite(values)
    figure = Figure(figsize=(5.2, 1.9), layout="constrained")
    axes = figure.add_subplot()
    if finite.any():
        edges = np.histogram_bin_edges(values[finite], BINS)
        axes.hist(values[finite], edges, color=MUTED, label="all")
        axes.hist(values[finite & kept], edges, color=INK, label="selected")
    for limit in limits:
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle="--")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return _svg(figure)


def _svg(figure: Any) -> str:
    import matplotlib

    stream = io.StringIO()
    # A fixed salt and no date: the same dataset gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "streamdit", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    for placeholder, colour in COLOURS.items():
        text = text.replace(placeholder, colour)
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def _examples(overview: Overview, pictures: _Pictures) -> list[Example]:
    """Clips evenly spread over those that are selected (all, before there is a selection)."""
    chosen = np.flatnonzero(overview.kept)
    if not len(chosen):
        return []
    places = np.unique(np.linspace(0, len(chosen) - 1, EXAMPLES).astype(int))
    rows = overview.clips.take(chosen[places]).to_pylist()
    examples = []
    for index, row in zip(chosen[places].tolist(), rows, strict=True):
        if picture := pictures.strip(index):
            status = row.get("caption_status") or "not captioned yet"
            caption = row.get("caption") or f"({status})"
            file = row["uri"].rsplit("/", 1)[-1]
            note = f"{file} at {row['start_s']:.2f} s, {row['bucket']}, clip {row['clip_id']}"
            examples.append(Example(picture, caption, note))
    return examples
