"""Second job: look at a few frames of each clip, write captions and scores beside the clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.captioners import Caption, Captioner, build_captioner
from pipeline.catalogue import Source
from pipeline.child import ChildError
from pipeline.config import IngestConfig
from pipeline.counters import annotate_counters, is_lost
from pipeline.dead_letters import DeadLetter, DeadLimit, quarantined, write_dead_letters
from pipeline.decode import sample_frames
from pipeline.decoders import TAKE_DECODER
from pipeline.graph import OnProgress, Row, result_row, run_stage, run_units
from pipeline.ledger import CLIPS_INPUT, Ledger, Marker, Wanted, require_markers
from pipeline.picture_scores import PICTURE_SCORES, PictureScores
from pipeline.plan import (
    Unit,
    read_plan,
    require_places,
    sidecar_key,
    sidecar_uris,
    unit_of,
    unit_tasks,
)
from pipeline.removal import finish_removal
from pipeline.schema import ANNOTATION_SCHEMA
from pipeline.settings import adopt_settings
from pipeline.shards import file_name, read_rows, write_table
from pipeline.storage import content_version
from pipeline.store import DatasetPath, Store, open_store
from pipeline.threads import map_in_order

STAGE = "annotate"
REVISION = 1
PICTURE_HEIGHT = 256
VERSION_THREADS = 8
RUN_CLIPS = 32
"""Clips of a video whose pictures are held at once: a film has thousands."""


@dataclass(frozen=True)
class AnnotateSummary:
    """What the annotation tables hold."""

    clips: int
    """Clips looked at."""
    captions: int
    """Clips with a caption."""
    missing: int
    """Clips that no caption describes."""
    failed: int
    """Clips whose caption file or picture could not be read, or that a captioner refused."""
    dead: int
    """Dead letters of this stage."""


def annotate(
    dataset_dir: DatasetPath,
    config: IngestConfig,
    on_progress: OnProgress | None = None,
    *,
    retry_dead: bool = False,
) -> AnnotateSummary:
    """Write captions and scores of the clips that `curate` found.

    Units whose clips, caption files and settings have not changed are skipped; of the others, what
    is known already about a clip is kept.

    Args:
        dataset_dir: dataset directory or `s3://` prefix.
        config: ingestion configuration.
        on_progress: called with units done, units in all and totals, as units finish.
        retry_dead: try again whatever failed before.

    Raises:
        UserError: if `curate` has not finished, too many clips fail, or the caption model cannot
            be used.
    """
    store = open_store(dataset_dir)
    finish_removal(store)
    places = require_places(store)
    (settings,) = adopt_settings(store, {STAGE: annotate_settings(config)}, config).values()
    ledger = Ledger(store, STAGE)
    done = ledger.read_done(_each_wanted(store, config, settings), retry_dead)
    units, tasks = [p.name for p in places], unit_tasks(places, done, settings, retry_dead)
    constructor = {"dataset_dir": store.root, "config": config}
    results = run_units(
        tasks,
        AnnotateUnit,
        constructor=constructor,
        workers=config.workers,
        cpus=config.threads,
        gpus=config.annotate.gpus,
    )
    limit = DeadLimit(store, STAGE, config.limits)
    totals = run_stage(units, done, results, on_progress, limit)
    if tasks:
        ledger.sweep(units)
    return AnnotateSummary(
        clips=int(totals.get("clips", 0)),
        captions=int(totals.get("captions", 0)),
        missing=int(totals.get("missing", 0)),
        failed=int(totals.get("failed", 0)),
        dead=int(totals.get("dead", 0)),
    )


def annotate_settings(config: IngestConfig) -> dict[str, Any]:
    """Everything that annotations depend on, apart from clips and caption files."""
    return {
        "revision": REVISION,
        "captions": config.captions.content,
        "scores": config.scores.content,
        "device": "gpu" if config.annotate.gpus else "cpu",
        "threads": config.threads,
    }


def annotate_wanted(store: Store, unit: Unit, config: IngestConfig, settings: str) -> Wanted:
    """What the annotations of a unit depend on: its clip table, and its caption files.

    Raises:
        UserError: if the unit is not curated.
    """
    tables = require_markers(store, "curate", [unit.name])[unit.name].files
    clips = ",".join(record.sha256 for record in tables if record.kind == "clip")
    beside = sidecar_uris(unit) if config.captions.captioner == "sidecar" else []
    files = {sidecar_key(uri): content_version(uri) for uri in beside}
    return Wanted(settings=settings, inputs={CLIPS_INPUT: clips, **files})


def _each_wanted(store: Store, config: IngestConfig, settings: str) -> Iterator[tuple[str, Wanted]]:
    """:func:`annotate_wanted` of every unit, with its name."""

    def look(unit: Unit) -> tuple[str, Wanted]:
        return unit.name, annotate_wanted(store, unit, config, settings)

    return map_in_order(look, read_plan(store), VERSION_THREADS)


class AnnotateUnit:
    """Stage: takes a unit, writes its annotation table and its marker."""

    def __init__(self, dataset_dir: str, config: IngestConfig) -> None:
        """Load the models for captions and scores, where there are any."""
        import torch

        torch.set_num_threads(config.threads)
        self.store = open_store(dataset_dir)
        self.config = config
        device = "cuda" if config.annotate.gpus else "cpu"
        self.captioner: Captioner = build_captioner(config.captions, device)
        self.scores = PictureScores(config.scores, config.threads, device)

    def __call__(self, row: Row) -> Iterable[Row]:
        """Annotate the clips of one unit."""
        unit = unit_of(self.store, row)
        wanted = annotate_wanted(self.store, unit, self.config, row["settings"])
        ledger = Ledger(self.store, STAGE)
        attempt = ledger.attempt(unit.name, wanted)
        curated = require_markers(self.store, "curate", [unit.name])[unit.name]
        clips = read_rows(self.store, curated, "clip")
        before = self._settled(ledger.read(unit.name), wanted)
        letters = {} if row["retry_dead"] else quarantined(self.store, [STAGE], unit.name)
        annotations: list[dict[str, Any]] = []
        dead: list[DeadLetter] = []
        for source in unit.sources:
            mine = [clip for clip in clips if clip["source_id"] == source.source_id]
            if mine:
                letter = letters.get(source.source_id)
                rows, failures = self._annotate_source(source, mine, before, letter, attempt)
                annotations.extend(rows)
                dead.extend(failures)
        annotations.sort(key=lambda annotation: annotation["clip_id"])
        ledger.begin(unit.name, wanted)
        path = file_name("annotation", unit.name)
        record = write_table(self.store, path, "annotation", annotations, ANNOTATION_SCHEMA)
        write_dead_letters(self.store, STAGE, unit.name, dead)
        counters = annotate_counters(annotations, dead)
        ledger.finish(unit.name, wanted, [record], counters, attempt)
        return [result_row(unit.name, counters)]

    def _settled(self, marker: Marker | None, wanted: Wanted) -> dict[str, Row]:
        """Rows by clip id that an earlier run with the same settings wrote without a failure."""
        if marker is None or marker.settings != wanted.settings:
            return {}
        try:
            rows = read_rows(self.store, marker, "annotation")
        except OSError:
            return {}
        return {
            row["clip_id"]: row for row in rows if not is_lost(row) and self.scores.has_all(row)
        }

    def _annotate_source(
        self,
        source: Source,
        clips: list[Row],
        before: dict[str, Row],
        quarantine: DeadLetter | None,
        attempt: int,
    ) -> tuple[list[Row], list[DeadLetter]]:
        """Rows for the clips of one video, and what failed on the way."""
        captions: dict[str, Caption] = {}
        if not self.captioner.reads_pictures:
            captions = self.captioner.describe(source, clips, {})
        stale = [clip for clip in clips if self._is_stale(clip["clip_id"], before, captions)]
        stale.sort(key=lambda clip: (clip["start_s"], clip["clip_id"]))
        measured: dict[str, dict[str, Any]] = {}
        failures = _Failures(source, attempt)
        left_alone = quarantine is not None
        for first in range(0, len(stale), RUN_CLIPS):
            run = stale[first : first + RUN_CLIPS]
            pictures: dict[str, list[np.ndarray]] = {}
            if not left_alone:
                try:
                    pictures = self._sample(source, run)
                except ChildError as error:
                    failures.add(error, run)
                    left_alone = error.error_class in TAKE_DECODER
            if self.captioner.reads_pictures:
                captions |= self.captioner.describe(source, run, pictures)
            texts = {i: captions[i].text for i in pictures if i in captions}
            measured |= self.scores.measure(pictures, texts)
        dead = [*([quarantine] if quarantine else []), *failures.letters.values()]
        asked = [clip for clip in clips if clip["clip_id"] in captions]
        dead += _caption_letters(source, asked, captions, self.captioner, attempt)
        looked_at = {clip["clip_id"] for clip in stale}
        rows = []
        for clip in clips:
            clip_id = clip["clip_id"]
            scores = measured.get(clip_id) or before.get(clip_id) or dict.fromkeys(PICTURE_SCORES)
            if clip_id not in measured and clip_id in looked_at:
                scores = {**scores, "clip_similarity": None}  # that of an earlier caption
            caption = _columns(captions[clip_id]) if clip_id in captions else {}
            rows.append({"clip_id": clip_id, **scores, **caption})
        return rows, dead

    def _is_stale(self, clip_id: str, before: dict[str, Row], captions: dict[str, Caption]) -> bool:
        """Whether a clip is to be looked at: a new one, or one whose new caption is scored."""
        if clip_id not in before:
            return True
        caption = captions.get(clip_id)
        changed = caption is not None and caption.text != before[clip_id]["caption"]
        return changed and self.scores.read_captions

    def _sample(self, source: Source, clips: list[Row]) -> dict[str, list[np.ndarray]]:
        """A few pictures of each clip, in order of time, by clip id."""
        count = self.config.captions.frames
        times = [
            clip["start_s"] + (i + 0.5) / count * (clip["end_s"] - clip["start_s"])
            for clip in clips
            for i in range(count)
        ]
        deadline_s, threads = self.config.decode.deadline_s, self.config.threads
        pictures = sample_frames(source.uri, times, PICTURE_HEIGHT, deadline_s, threads)
        assert len(pictures) == len(times)
        return {
            clip["clip_id"]: pictures[i * count : (i + 1) * count] for i, clip in enumerate(clips)
        }


class _Failures:
    """Dead letters of runs of clips whose pictures could not be had, one for each reason."""

    def __init__(self, source: Source, attempt: int) -> None:
        self.source = source
        self.attempt = attempt
        self.letters: dict[str, DeadLetter] = {}

    def add(self, error: ChildError, clips: Sequence[Row]) -> None:
        """Note why the pictures of `clips`, in order of time, are not there."""
        known, end_s = self.letters.get(str(error)), clips[-1]["end_s"]
        self.letters[str(error)] = (
            replace(known, end_s=end_s)
            if known
            else _letter(error, self.source, self.attempt, (clips[0]["start_s"], end_s))
        )


def _columns(caption: Caption) -> Row:
    return {
        "caption": caption.text,
        "caption_model": caption.model,
        "caption_status": caption.status,
    }


def _caption_letters(
    source: Source,
    clips: Sequence[Row],
    captions: dict[str, Caption],
    captioner: Captioner,
    attempt: int,
) -> list[DeadLetter]:
    """A dead letter for each reason: by clip where clips are asked about one by one."""
    letters: dict[int, DeadLetter] = {}
    for clip in clips:
        if error := captions[clip["clip_id"]].error:
            span = (clip["start_s"], clip["end_s"]) if captioner.reads_pictures else (None, None)
            letters.setdefault(id(error), _letter(error, source, attempt, span))
    return list(letters.values())


def _letter(
    error: ChildError,
    source: Source,
    attempt: int,
    span: tuple[float, float] | tuple[None, None] = (None, None),
) -> DeadLetter:
    return DeadLetter.of(
        error,
        source_id=source.source_id,
        uri=source.uri,
        stage=STAGE,
        attempts=attempt,
        span=span,
    )
