"""First job: list the videos, decode each once at low resolution, write clips with scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.child import ChildError, shared_child
from pipeline.config import IngestConfig
from pipeline.dead_letters import LISTING, DeadLetter, write_dead_letters
from pipeline.graph import OnProgress, Row, result_row, run_stage, run_units
from pipeline.ledger import Ledger, fingerprint
from pipeline.plan import Unit, extend_plan
from pipeline.schema import CLIP_SCHEMA, SOURCE_SCHEMA, FileRecord, read_dead_letters
from pipeline.shards import file_name, write_table
from pipeline.sources import Listing, Source, list_sources
from pipeline.survey import survey
from streamdit.errors import UserError

STAGE = "curate"
REVISION = 2
"""Raised when this code changes what it writes, so that old units are done again."""


@dataclass(frozen=True)
class CurateSummary:
    """What the dataset holds after `curate`."""

    sources: int
    """Videos that could be decoded."""
    clips: int
    """Training clips in them."""
    dead: int
    """Videos that could not be read or decoded; see :func:`pipeline.schema.read_dead_letters`."""
    video_s: float
    """Seconds of video decoded."""
    skipped: dict[str, int]
    """Reason to number of files that are no sources."""
    units: int
    """Units of work."""


def curate(
    inputs: Sequence[str],
    dataset_dir: Path | str,
    config: IngestConfig,
    on_progress: OnProgress | None = None,
) -> CurateSummary:
    """Find the videos in `inputs` and write their clips to `dataset_dir`.

    Videos that earlier runs have finished are skipped; sources of earlier runs stay.

    Args:
        inputs: see :func:`pipeline.sources.list_sources`.
        dataset_dir: dataset directory; created if missing.
        config: ingestion configuration.
        on_progress: called with units done, units in all and totals, as units finish.

    Raises:
        UserError: if an input is missing, or if no clip at all came out.
    """
    dataset = Path(dataset_dir)
    listing = list_sources(inputs)
    write_dead_letters(dataset, "list", LISTING, _unreadable(listing))
    units = extend_plan(dataset, listing.sources, config.unit_sources)
    ledger = Ledger(dataset, STAGE)
    wanted = {unit.name: curate_fingerprint(unit, config) for unit in units}
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
    stage = make_curate_unit(str(dataset.absolute()), config)
    results = run_units(tasks, stage, workers=config.workers, cpus=config.threads)
    totals = run_stage(list(wanted), done, results, on_progress)
    summary = CurateSummary(
        sources=int(totals.get("sources", 0)),
        clips=int(totals.get("clips", 0)),
        dead=int(totals.get("dead", 0)) + len(listing.dead),
        video_s=totals.get("video_s", 0.0),
        skipped=dict(sorted(listing.skipped.items())),
        units=len(units),
    )
    if not summary.clips:
        raise _no_clips(dataset, summary, config)
    return summary


def curate_fingerprint(unit: Unit, config: IngestConfig) -> str:
    """Hash of everything that the files of a curated unit depend on."""
    members = [[s.source_id, s.uri, s.licence, s.attribution] for s in unit.sources]
    return fingerprint(STAGE, REVISION, members, config.clip, config.scenes, config.threads)


def make_curate_unit(dataset_dir: str, config: IngestConfig) -> Callable[[Row], Iterable[Row]]:
    """Stage function: takes a unit, writes its source and clip tables and its marker."""

    def curate_unit(row: Row) -> Iterable[Row]:
        dataset, unit = Path(dataset_dir), Unit.from_json(row["unit"])
        ledger = Ledger(dataset, STAGE)
        attempt = ledger.attempt(unit.name, row["fingerprint"])
        sources: list[dict[str, Any]] = []
        clips: list[dict[str, Any]] = []
        dead: list[DeadLetter] = []
        for source in unit.sources:
            try:
                described, found = survey_in_child(source, config)
            except ChildError as error:
                dead.append(
                    DeadLetter.of(
                        error,
                        source_id=source.source_id,
                        uri=source.uri,
                        stage=STAGE,
                        attempts=attempt,
                    )
                )
                continue
            terms = {"licence": source.licence, "attribution": source.attribution}
            sources.append({**described, "bytes": source.size, **terms})
            clips.extend({**clip, **terms} for clip in found)
        files = write_unit(dataset, unit.name, config.clip.bucket, sources, clips)
        write_dead_letters(dataset, STAGE, unit.name, dead)
        counters: dict[str, float] = {
            "sources": len(sources),
            "clips": len(clips),
            "dead": len(dead),
            "retryable": sum(letter.retryable for letter in dead),
            "video_s": sum(source["duration_s"] for source in sources),
        }
        ledger.finish(unit.name, row["fingerprint"], files, counters)
        return [result_row(unit.name, counters)]

    return curate_unit


def survey_in_child(
    source: Source, config: IngestConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """:func:`pipeline.survey.survey` in a child process, under the deadline."""
    return shared_child(config.threads).call(
        survey,
        source.uri,
        source.source_id,
        config.clip,
        config.scenes,
        deadline_s=config.decode.deadline_s,
    )


def write_unit(
    dataset: Path,
    unit: str,
    bucket: str,
    sources: list[dict[str, Any]],
    clips: list[dict[str, Any]],
) -> list[FileRecord]:
    """Write the tables of a unit, rows in a canonical order."""
    sources = sorted(sources, key=lambda row: row["source_id"])
    clips = sorted(clips, key=lambda row: row["clip_id"])
    return [
        write_table(dataset, file_name("source", unit), "source", sources, SOURCE_SCHEMA),
        write_table(dataset, file_name("clip", unit, bucket), "clip", clips, CLIP_SCHEMA),
    ]


def _unreadable(listing: Listing) -> list[DeadLetter]:
    """Dead letters of files that could not even be identified."""
    return [
        DeadLetter(
            source_id=None,
            uri=uri,
            stage="list",
            error_class=error_class,
            message=message,
            retryable=retryable,
        )
        for uri, error_class, message, retryable in listing.dead
    ]


def _no_clips(dataset: Path, summary: CurateSummary, config: IngestConfig) -> UserError:
    """Why nothing came out, with the commonest reasons."""
    if summary.dead and not summary.sources:
        classes = Counter(read_dead_letters(dataset)["error_class"].to_pylist())
        reasons = ", ".join(f"{name} ({count})" for name, count in classes.most_common(3))
        return UserError(
            f"none of {summary.dead} videos could be decoded: {reasons}; see the tables below "
            f"{dataset / 'dead'} for each file"
        )
    return UserError(
        f"no training clip fits into the scenes of {summary.sources} videos: a clip takes "
        f"{config.clip.duration_s:g} s without a cut; lower clip.frames, or raise clip.fps or "
        "scenes.threshold"
    )
