"""First job: list the videos, decode each once at low resolution, write clips with scores."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.catalogue import Source
from pipeline.child import ChildError, shared_child
from pipeline.config import IngestConfig
from pipeline.counters import curate_counters
from pipeline.dead_letters import (
    LISTING,
    DeadLetter,
    DeadLimit,
    read_unit_dead_letters,
    write_dead_letters,
)
from pipeline.duplicate_table import count_duplicates, update_duplicates
from pipeline.graph import OnProgress, Row, result_row, run_stage, run_units
from pipeline.ledger import Ledger, Wanted, fingerprint
from pipeline.plan import Unit, extend_plan, read_places, read_plan, unit_of, unit_tasks
from pipeline.removal import finish_removal
from pipeline.removed import leave_out_removed
from pipeline.schema import CLIP_SCHEMA, SOURCE_SCHEMA, FileKind, FileRecord, read_dead_letters
from pipeline.settings import adopt_settings
from pipeline.shards import file_name, read_rows, write_table
from pipeline.sources import Listing, list_sources
from pipeline.storage import is_s3
from pipeline.store import DatasetPath, Store, open_store
from pipeline.survey import survey
from streamdit.errors import UserError

STAGE, LIST = "curate", "list"
REVISION = 3
"""Raised when this code changes what it writes, so that old units are done again."""


@dataclass(frozen=True)
class CurateSummary:
    """What the dataset holds after `curate`."""

    sources: int
    """Videos that could be decoded."""
    clips: int
    """Training clips in them."""
    duplicates: int
    """Of these, near duplicates of another one that stays."""
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
    dataset_dir: DatasetPath,
    config: IngestConfig,
    on_progress: OnProgress | None = None,
    *,
    retry_dead: bool = False,
    replace: bool = False,
) -> CurateSummary:
    """Find the videos in `inputs` and write their clips to `dataset_dir`.

    Videos that earlier runs have finished are skipped; sources of earlier runs stay.

    Args:
        inputs: see :func:`pipeline.sources.list_sources`.
        dataset_dir: dataset directory or `s3://` prefix; created if missing.
        config: ingestion configuration.
        on_progress: called with units done, units in all and totals, as units finish.
        retry_dead: try again whatever failed before.
        replace: do units again that were made with other settings.

    Raises:
        UserError: if an input is missing, too many fail, or no clip at all came out.
    """
    store = open_store(dataset_dir)
    finish_removal(store)
    listing = leave_out_removed(store, list_sources(inputs))
    (settings,) = adopt_settings(
        store, {STAGE: curate_settings(config)}, config, replace=replace
    ).values()
    letters = _unreadable(listing)
    write_dead_letters(store, LIST, LISTING, [*letters, *_earlier_letters(store, inputs, listing)])
    found = {"inputs": len(listing.sources) + len(letters), "lost": len(letters)}
    DeadLimit(store, LIST, config.limits).check(found)
    units = extend_plan(store, listing.sources, config.unit_sources)
    skipped = dict(sorted(listing.skipped.items()))
    del listing  # its databases take memory and room on disk
    totals = curate_units(store, config, settings, on_progress, retry_dead)
    summary = CurateSummary(
        sources=int(totals.get("sources", 0)),
        clips=int(totals.get("clips", 0)),
        duplicates=int(totals.get("duplicates", 0)),
        dead=int(totals.get("dead", 0)) + len(letters),
        video_s=totals.get("video_s", 0.0),
        skipped=skipped,
        units=units,
    )
    if not summary.clips:
        raise _no_clips(store, summary, config)
    return summary


def curate_units(
    store: Store,
    config: IngestConfig,
    settings: str,
    on_progress: OnProgress | None = None,
    retry_dead: bool = False,
) -> dict[str, float]:
    """Do the units of the plan that are not done, then compare all clips; totals over all."""
    ledger = Ledger(store, STAGE)
    wanted = ((unit.name, curate_wanted(unit, settings)) for unit in read_plan(store))
    done = ledger.read_done(wanted, retry_dead)
    places = [place for place, _ in read_places(store)]
    units, tasks = [p.name for p in places], unit_tasks(places, done, settings, retry_dead)
    stage = make_curate_unit(store.root, config)
    results = run_units(tasks, stage, workers=config.workers, cpus=config.threads)
    limit = DeadLimit(store, STAGE, config.limits)
    totals = run_stage(units, done, results, on_progress, limit)
    if tasks:
        ledger.sweep(units)
    update_duplicates(store, units, config.scores.duplicate_bits)
    return {**totals, "duplicates": count_duplicates(store)}


def curate_settings(config: IngestConfig) -> dict[str, Any]:
    """Everything that the files of a curated unit depend on, apart from its sources."""
    values = config.model_dump(
        mode="json",
        include={"clip": True, "scenes": True, "threads": True, "decode": {"salvage", "still"}},
    )
    return {"revision": REVISION, **values}


def curate_wanted(unit: Unit, settings: str) -> Wanted:
    """What the files of a curated unit depend on."""
    inputs = {
        source.source_id: fingerprint(source.uri, source.licence, source.attribution)
        for source in unit.sources
    }
    return Wanted(settings=settings, inputs=inputs)


def make_curate_unit(dataset_dir: str, config: IngestConfig) -> Callable[[Row], Iterable[Row]]:
    """Stage function: takes a unit, writes its source and clip tables and its marker."""

    def curate_unit(row: Row) -> Iterable[Row]:
        store = open_store(dataset_dir)
        unit = unit_of(store, row)
        ledger, wanted = Ledger(store, STAGE), curate_wanted(unit, row["settings"])
        attempt = ledger.attempt(unit.name, wanted)
        sources, clips, given_up = kept_rows(store, unit, wanted, row["retry_dead"])
        settled = {source["source_id"] for source in sources}
        dead: list[DeadLetter] = []
        for source in unit.sources:
            if source.source_id in settled:
                continue
            if source.source_id in given_up:
                dead.append(given_up[source.source_id])
                continue
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
            sources.append({**described, "bytes": source.size, **_terms(source)})
            clips.extend({**clip, **_terms(source)} for clip in found)
        ledger.begin(unit.name, wanted)
        files = write_unit(store, unit.name, sources, clips)
        write_dead_letters(store, STAGE, unit.name, dead)
        counters = curate_counters(sources, len(clips), dead)
        ledger.finish(unit.name, wanted, files, counters, attempt)
        return [result_row(unit.name, counters)]

    return curate_unit


def kept_rows(
    store: Store, unit: Unit, wanted: Wanted, retry_dead: bool
) -> tuple[list[Row], list[Row], dict[str, DeadLetter]]:
    """What an earlier run with the same settings found out about the sources of a unit.

    A source is known by its content, so what was found stays true of a video that was moved, or
    whose terms were changed since; only these are brought up to date.

    Returns:
        Rows of the source table, rows of the clip table, and dead letters by source that are not
        tried again.
    """
    ledger = Ledger(store, STAGE)
    known = ledger.read(unit.name)
    same = wanted.model_copy(update={"inputs": known.inputs if known else {}})
    marker = ledger.read_matching(unit.name, same)
    if marker is None:
        return [], [], {}
    now = {source.source_id: source for source in unit.sources}

    def renewed(kind: FileKind) -> list[Row]:
        found = [(row, now.get(row["source_id"])) for row in read_rows(store, marker, kind)]
        return [{**row, "uri": s.uri, **_terms(s)} for row, s in found if s]

    letters = read_unit_dead_letters(store, STAGE, unit.name)
    given_up = {
        letter.source_id: replace(letter, uri=now[letter.source_id].uri)
        for letter in letters
        if letter.source_id in now and not letter.retryable and not retry_dead
    }
    return renewed("source"), renewed("clip"), given_up


def _terms(source: Source) -> Row:
    return {"licence": source.licence, "attribution": source.attribution}


def survey_in_child(
    source: Source, config: IngestConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """:func:`pipeline.survey.survey` in a child process, under the deadline for each picture."""
    return shared_child(config.threads).call(
        survey,
        source.uri,
        source.source_id,
        config.clip,
        config.scenes,
        config.decode.salvage,
        config.decode.still,
        deadline_s=config.decode.deadline_s,
    )


def write_unit(
    store: Store, unit: str, sources: list[dict[str, Any]], clips: list[dict[str, Any]]
) -> list[FileRecord]:
    """Write the tables of a unit, rows in a canonical order."""
    sources = sorted(sources, key=lambda row: row["source_id"])
    clips = sorted(clips, key=lambda row: row["clip_id"])
    return [
        write_table(store, file_name("source", unit), "source", sources, SOURCE_SCHEMA),
        write_table(store, file_name("clip", unit), "clip", clips, CLIP_SCHEMA),
    ]


def _unreadable(listing: Listing) -> list[DeadLetter]:
    """Dead letters of files that could not even be identified."""
    return [
        DeadLetter(
            source_id=None,
            uri=uri,
            stage=LIST,
            error_class=error_class,
            message=message,
            retryable=retryable,
        )
        for uri, error_class, message, retryable in listing.dead
    ]


def _earlier_letters(store: Store, inputs: Sequence[str], listing: Listing) -> list[DeadLetter]:
    """Letters of files that this listing did not look for: they came with other inputs."""
    earlier = read_unit_dead_letters(store, LIST, LISTING)
    places = [name if is_s3(name) else os.path.abspath(os.path.expanduser(name)) for name in inputs]
    folders = tuple(f"{place.rstrip('/')}/" for place in places)
    return [
        letter
        for letter in earlier
        if letter.uri not in places
        and not letter.uri.startswith(folders)
        and not listing.has_seen(letter.uri)
    ]


def _no_clips(store: Store, summary: CurateSummary, config: IngestConfig) -> UserError:
    """Why nothing came out, with the commonest reasons."""
    if summary.dead and not summary.sources:
        classes = Counter(read_dead_letters(store)["error_class"].to_pylist())
        reasons = ", ".join(f"{name} ({count})" for name, count in classes.most_common(3))
        return UserError(
            f"none of {summary.dead} videos could be decoded: {reasons}; see the tables below "
            f"{store.uri('dead')} for each file"
        )
    return UserError(
        f"no training clip fits into the scenes of {summary.sources} videos: a clip takes "
        f"{config.clip.duration_s:g} s without a cut; lower clip.frames, or raise clip.fps or "
        "scenes.threshold"
    )
