"""Mending a dataset: drop what is damaged, and make it again from the videos."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from pipeline.annotate import annotate
from pipeline.check import Problem, check_dataset
from pipeline.counters import latent_counters
from pipeline.curate import curate_units
from pipeline.dead_letters import read_unit_dead_letters
from pipeline.duplicate_table import ALL_UNITS
from pipeline.encode import encode
from pipeline.graph import OnProgress
from pipeline.ledger import STAGE_KINDS, Ledger
from pipeline.pending import LATENTS
from pipeline.plan import read_plan, require_unit_names
from pipeline.schema import AUTOENCODER_FOLDER, MANIFEST_FILE
from pipeline.settings import StageRecord, read_record
from pipeline.stage_text import NULL_UNIT
from pipeline.storage import file_size
from pipeline.store import DatasetPath, Store, open_store
from streamdit.errors import UserError

Progress = Callable[[str], AbstractContextManager[OnProgress]]
"""Shows the progress of a job of this name."""


@dataclass(frozen=True)
class RepairSummary:
    """What a repair did."""

    problems: tuple[Problem, ...]
    """What was wrong before."""
    units: int
    """Units that were done again, in whichever stage."""


def repair_dataset(dataset_dir: DatasetPath, progress: Progress) -> RepairSummary:
    """Remove damaged and stray files with their markers, and do the jobs again that made them.

    The jobs use the settings that the dataset was made with, and run as far as they had run.

    Args:
        dataset_dir: dataset directory or `s3://` prefix.
        progress: called with the name of each job.

    Raises:
        UserError: if the autoencoder is damaged, or a clip table whose videos are gone: neither
            can be made again. Then nothing is dropped.
    """
    store = open_store(dataset_dir)
    records = {stage: read_record(store, stage) for stage in STAGE_KINDS}
    with progress("verify") as on_progress:
        problems = check_dataset(store, on_progress).problems
    if any(problem.path == AUTOENCODER_FOLDER for problem in problems):
        raise UserError(
            f"the autoencoder of {store.root} is damaged and cannot be made from the videos: run "
            "`streamdit ingest --only encode --autoencoder DIR` with the one that made the latents"
        )
    damaged = {problem.path for problem in problems}
    _require_videos(store, damaged)
    units = _drop(store, damaged)
    if problems:
        store.delete(MANIFEST_FILE)
    _run_again(store, records, progress)
    return RepairSummary(problems, units)


def _require_videos(store: Store, damaged: set[str]) -> None:
    """Refuse to drop tables of clips that cannot be made again, for the videos are gone."""
    ledger = Ledger(store, "curate")
    for unit in read_plan(store):
        marker = ledger.read(unit.name)
        if marker is None or not damaged & {record.path for record in marker.files}:
            continue
        for source in unit.sources:
            if file_size(source.uri) < 0:
                raise UserError(
                    f"clip tables of {store.root} are damaged and cannot be made again without "
                    f"{source.uri}, which cannot be opened: put the video back, then repair"
                )


def _drop(store: Store, damaged: set[str]) -> int:
    """Delete files, and what the ledger says of them; returns the units that are touched.

    Latents that are whole stay: a marker without the damaged shard makes `encode` look for the
    clips that are missing, and no more videos are needed than those of that shard.
    """
    dropped = 0
    names = [*require_unit_names(store), NULL_UNIT, ALL_UNITS]
    for stage in STAGE_KINDS:
        ledger = Ledger(store, stage)
        for unit, marker in ledger.each(names):
            whole = tuple(record for record in marker.files if record.path not in damaged)
            if whole == marker.files:
                continue
            dropped += 1
            if stage == LATENTS and whole:
                letters = read_unit_dead_letters(store, LATENTS, unit)
                update = {"files": whole, "counters": latent_counters(whole, letters)}
                ledger.write(marker.model_copy(update=update))
            else:
                store.delete(ledger.path(unit))
    for path in damaged:
        store.delete(path)
    return dropped


def _run_again(store: Store, records: dict[str, StageRecord | None], progress: Progress) -> None:
    """The jobs that had run before; what is whole they leave alone."""
    if curated := records["curate"]:
        with progress("curate") as on_progress:
            curate_units(store, curated.config, curated.fingerprint, on_progress)
    if annotated := records["annotate"]:
        with progress("annotate") as on_progress:
            annotate(store.root, annotated.config, on_progress)
    encoded = records[LATENTS]
    if encoded and encoded.autoencoder:
        own = encoded.autoencoder.source == AUTOENCODER_FOLDER
        folder = store.local_folder(AUTOENCODER_FOLDER) if own else nullcontext("")
        with folder as path, progress("encode") as on_progress:
            encode(store.root, path or encoded.autoencoder.source, encoded.config, on_progress)
