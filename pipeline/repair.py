"""Mending a dataset: drop what is damaged, and make it again from the videos."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from pipeline.annotate import annotate
from pipeline.check import Problem, check_dataset
from pipeline.curate import curate_units
from pipeline.duplicate_table import ALL_UNITS
from pipeline.encode import encode
from pipeline.graph import OnProgress
from pipeline.ledger import STAGE_KINDS, Ledger
from pipeline.pending import LATENTS
from pipeline.plan import require_plan
from pipeline.schema import AUTOENCODER_FOLDER, MANIFEST_FILE
from pipeline.settings import StageRecord, read_record
from pipeline.stage_text import NULL_UNIT
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
        UserError: if the dataset was made by another version, or its autoencoder is damaged.
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
    units = _drop(store, {problem.path for problem in problems})
    if problems:
        store.delete(MANIFEST_FILE)
    _run_again(store, records, progress)
    return RepairSummary(problems, units)


def _drop(store: Store, damaged: set[str]) -> int:
    """Delete files and the markers that list them; returns the number of these."""
    dropped = 0
    names = [*(unit.name for unit in require_plan(store)), NULL_UNIT, ALL_UNITS]
    for stage in STAGE_KINDS:
        ledger = Ledger(store, stage)
        for unit, marker in ledger.read_all(names).items():
            if damaged & {record.path for record in marker.files}:
                store.delete(ledger.path(unit))
                dropped += 1
    for path in damaged:
        store.delete(path)
    return dropped


def _run_again(store: Store, records: dict[str, StageRecord | None], progress: Progress) -> None:
    """The jobs that had run before; what is whole they leave alone."""
    if curated := records["curate"]:
        with progress("curate") as on_progress:
            units = require_plan(store)
            curate_units(store, units, curated.config, curated.fingerprint, on_progress)
    if annotated := records["annotate"]:
        with progress("annotate") as on_progress:
            annotate(store.root, annotated.config, on_progress)
    encoded = records[LATENTS]
    if encoded and encoded.autoencoder:
        own = encoded.autoencoder.source == AUTOENCODER_FOLDER
        folder = store.local_folder(AUTOENCODER_FOLDER) if own else nullcontext("")
        with folder as path, progress("encode") as on_progress:
            encode(store.root, path or encoded.autoencoder.source, encoded.config, on_progress)
