"""Second job: look at a few frames of each clip, write captions and scores beside the clips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.captions import CaptionFileError, CocaCaptioner, Cue, caption_for, read_cues
from pipeline.child import ChildError, describe_error
from pipeline.config import IngestConfig
from pipeline.dead_letters import DeadLetter, write_dead_letters
from pipeline.decode import sample_frames
from pipeline.graph import OnProgress, Row, result_row, run_stage, run_units
from pipeline.ledger import Ledger, Marker, fingerprint
from pipeline.plan import Unit, require_plan
from pipeline.schema import ANNOTATION_SCHEMA, CLIP_SCHEMA
from pipeline.scores import colourfulness
from pipeline.shards import file_name, write_table
from pipeline.sources import Source
from pipeline.storage import content_version
from streamdit.errors import UserError

STAGE = "annotate"
REVISION = 1
PICTURE_HEIGHT = 256
VERSION_THREADS = 8


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
    """Clips whose caption file or picture could not be read."""
    dead: int
    """Dead letters of this stage."""


def annotate(
    dataset_dir: Path | str, config: IngestConfig, on_progress: OnProgress | None = None
) -> AnnotateSummary:
    """Write captions and scores of the clips that `curate` found.

    Units whose clips, caption files and settings have not changed are skipped.

    Args:
        dataset_dir: dataset directory.
        config: ingestion configuration.
        on_progress: called with units done, units in all and totals, as units finish.

    Raises:
        UserError: if `curate` has not finished, or the caption model cannot be loaded.
    """
    dataset = Path(dataset_dir)
    units = require_plan(dataset)
    clips = {unit.name: require_marker(dataset, "curate", unit.name) for unit in units}
    with ThreadPoolExecutor(VERSION_THREADS) as pool:
        versions = pool.map(_sidecar_versions, units)
    wanted = {
        unit.name: fingerprint(
            STAGE,
            REVISION,
            [record.sha256 for record in clips[unit.name].files if record.kind == "clip"],
            beside if config.captions.captioner == "sidecar" else [],
            config.captions,
            config.threads,
        )
        for unit, beside in zip(units, versions, strict=True)
    }
    ledger = Ledger(dataset, STAGE)
    done = {
        name: marker.counters
        for name, print_ in wanted.items()
        if (marker := ledger.read_done(name, print_))
    }
    tasks = [
        {"unit": unit.to_json(), "fingerprint": wanted[unit.name]}
        for unit in units
        if unit.name not in done
    ]
    constructor = {"dataset_dir": str(dataset.absolute()), "config": config}
    results = run_units(
        tasks, AnnotateUnit, constructor=constructor, workers=config.workers, cpus=config.threads
    )
    totals = run_stage(list(wanted), done, results, on_progress)
    return AnnotateSummary(
        clips=int(totals.get("clips", 0)),
        captions=int(totals.get("captions", 0)),
        missing=int(totals.get("missing", 0)),
        failed=int(totals.get("failed", 0)),
        dead=int(totals.get("dead", 0)),
    )


def require_marker(dataset: Path, stage: str, unit: str) -> Marker:
    """The marker that an earlier stage left for a unit.

    Raises:
        UserError: if that stage has not finished it.
    """
    marker = Ledger(dataset, stage).read(unit)
    if marker is None:
        raise UserError(
            f"dataset {dataset} is not finished with {stage} (unit {unit}): run "
            f"`streamdit ingest --only {stage}` (again) first"
        )
    return marker


def unit_rows(dataset: Path, marker: Marker, kind: str) -> list[dict[str, Any]]:
    """Rows of the tables of one kind that a marker lists."""
    tables = [record.path for record in marker.files if record.kind == kind]
    return [row for path in tables for row in pq.read_table(dataset / path).to_pylist()]


class AnnotateUnit:
    """Stage: takes a unit, writes its annotation table and its marker."""

    def __init__(self, dataset_dir: str, config: IngestConfig) -> None:
        """Load the caption model, where there is one."""
        self.dataset = Path(dataset_dir)
        self.config = config
        self.captioner: CocaCaptioner | None = None
        if config.captions.captioner == "coca":
            import torch

            torch.set_num_threads(config.threads)
            self.captioner = CocaCaptioner(
                config.captions.model,
                config.captions.pretrained,
                config.captions.batch,
                config.captions.max_tokens,
                device="cuda" if torch.cuda.is_available() else "cpu",
            )

    def __call__(self, row: Row) -> Iterable[Row]:
        """Annotate the clips of one unit."""
        unit = Unit.from_json(row["unit"])
        ledger = Ledger(self.dataset, STAGE)
        attempt = ledger.attempt(unit.name, row["fingerprint"])
        clips = unit_rows(self.dataset, require_marker(self.dataset, "curate", unit.name), "clip")
        assert all(set(clip) == set(CLIP_SCHEMA.names) for clip in clips)
        annotations: list[dict[str, Any]] = []
        dead: list[DeadLetter] = []
        for source in unit.sources:
            mine = [clip for clip in clips if clip["source_id"] == source.source_id]
            if mine:
                rows, failures = self._annotate_source(source, mine, attempt)
                annotations.extend(rows)
                dead.extend(failures)
        annotations.sort(key=lambda annotation: annotation["clip_id"])
        path = file_name("annotation", unit.name)
        record = write_table(self.dataset, path, "annotation", annotations, ANNOTATION_SCHEMA)
        write_dead_letters(self.dataset, STAGE, unit.name, dead)
        statuses = [annotation["caption_status"] for annotation in annotations]
        counters: dict[str, float] = {
            "clips": len(annotations),
            "captions": statuses.count("ok"),
            "missing": statuses.count("missing"),
            "failed": statuses.count("failed"),
            "dead": len(dead),
            "retryable": sum(letter.retryable for letter in dead),
        }
        ledger.finish(unit.name, row["fingerprint"], [record], counters)
        return [result_row(unit.name, counters)]

    def _annotate_source(
        self, source: Source, clips: list[dict[str, Any]], attempt: int
    ) -> tuple[list[dict[str, Any]], list[DeadLetter]]:
        """Rows for the clips of one video, and what failed on the way."""
        dead: list[DeadLetter] = []

        def failed(error: ChildError) -> None:
            dead.append(
                DeadLetter.of(
                    error,
                    source_id=source.source_id,
                    uri=source.uri,
                    stage=STAGE,
                    attempts=attempt,
                )
            )

        pictures: list[list[np.ndarray]] | None = None
        try:
            pictures = self._sample(source, clips)
        except ChildError as error:
            failed(error)
        if self.captioner is None:
            try:
                captions = sidecar_captions(source, clips)
            except (CaptionFileError, OSError) as error:
                failed(ChildError(*describe_error(error)))
                captions = [("", "", "failed")] * len(clips)
        else:
            captions = self._describe(self.captioner, pictures, len(clips))
        rows = []
        for i, (clip, (caption, model, status)) in enumerate(zip(clips, captions, strict=True)):
            rows.append(
                {
                    "clip_id": clip["clip_id"],
                    "caption": caption,
                    "caption_model": model,
                    "caption_status": status,
                    "colourfulness": None if pictures is None else colourfulness(pictures[i]),
                }
            )
        return rows, dead

    def _sample(self, source: Source, clips: list[dict[str, Any]]) -> list[list[np.ndarray]]:
        """A few pictures of each clip, in order."""
        count = self.config.captions.frames
        times = [
            clip["start_s"] + (i + 0.5) / count * (clip["end_s"] - clip["start_s"])
            for clip in clips
            for i in range(count)
        ]
        deadline_s, threads = self.config.decode.deadline_s, self.config.threads
        pictures = sample_frames(source.uri, times, PICTURE_HEIGHT, deadline_s, threads)
        return [pictures[i : i + count] for i in range(0, len(pictures), count)]

    def _describe(
        self, captioner: CocaCaptioner, pictures: list[list[np.ndarray]] | None, clips: int
    ) -> list[tuple[str, str, str]]:
        """CoCa's captions of the middle pictures."""
        if pictures is None:
            return [("", "", "failed")] * clips
        name = f"coca:{self.config.captions.model}"
        texts = captioner.caption([several[len(several) // 2] for several in pictures])
        return [(text, name, "ok" if text else "missing") for text in texts]


def sidecar_captions(source: Source, clips: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Caption, its origin and status for each clip, from the first file that describes it.

    Raises:
        CaptionFileError: if a caption file cannot be understood.
        OSError: if it cannot be read.
    """
    cues: list[tuple[str, list[Cue]]] = [
        (f"sidecar:{uri.rsplit('.', 1)[-1]}", read_cues(uri)) for uri in source.sidecars
    ]
    found = []
    for clip in clips:
        described = ((caption_for(c, clip["start_s"], clip["end_s"]), name) for name, c in cues)
        caption, name = next(((text, name) for text, name in described if text), ("", ""))
        found.append((caption, name, "ok" if caption else "missing"))
    return found


def _sidecar_versions(unit: Unit) -> list[list[str]]:
    """Which caption files a unit has, and which content."""
    return [[uri, content_version(uri)] for source in unit.sources for uri in source.sidecars]
