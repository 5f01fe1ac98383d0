"""Choosing again among the clips of a dataset: a new index in seconds, nothing encoded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import IngestConfig
from pipeline.duplicate_table import read_duplicates
from pipeline.index import publish_dataset
from pipeline.ledger import READERS
from pipeline.pending import LATENTS, candidate_table
from pipeline.plan import require_plan
from pipeline.schema import load_manifest
from pipeline.select import clauses_of, evaluate
from pipeline.settings import read_record
from pipeline.store import DatasetPath, Store, open_store
from streamdit.errors import UserError


@dataclass(frozen=True)
class Clause:
    """What one condition of a selection does."""

    text: str
    """The condition."""
    drops: int
    """Clips that do not fulfil it."""
    alone: int
    """Of these, clips that fulfil all the others."""
    unknown: int
    """Of these, clips about which it cannot tell because a value is missing (null)."""


@dataclass(frozen=True)
class Choice:
    """What an expression keeps."""

    clips: int
    """Clips of the dataset."""
    selected: int
    """Clips that fulfil the expression."""
    clauses: tuple[Clause, ...]
    """Conditions that it joins with `and`."""


@dataclass(frozen=True)
class Published:
    """The index that was written."""

    version: int
    """Its version."""
    rows: int
    """Clips in it: those selected that have latents."""
    held_out: int
    """Of these, clips kept from training."""


def preview(dataset_dir: DatasetPath, expression: str) -> Choice:
    """Count what `expression` would keep, and what each of its conditions drops.

    Args:
        dataset_dir: dataset directory or `s3://` prefix, curated and annotated.
        expression: see :func:`pipeline.select.compile_selection`.

    Raises:
        UserError: if the expression is wrong, or the dataset is not annotated.
    """
    clauses = clauses_of(expression)
    tables = _candidates(open_store(dataset_dir))
    kept = [_evaluate_each(table, clauses) for table in tables.values()]
    known = [
        _evaluate_each(table, [f"({clause}) is not None" for clause in clauses])
        for table in tables.values()
    ]
    fulfilled, told = np.concatenate(kept, axis=1), np.concatenate(known, axis=1)
    failures = (~fulfilled).sum(axis=0)
    return Choice(
        clips=fulfilled.shape[1],
        selected=int((failures == 0).sum()),
        clauses=tuple(
            Clause(
                text=text,
                drops=int((~fulfilled[i]).sum()),
                alone=int((~fulfilled[i] & (failures == 1)).sum()),
                unknown=int((~told[i]).sum()),
            )
            for i, text in enumerate(clauses)
        ),
    )


def reselect(dataset_dir: DatasetPath, expression: str) -> Published:
    """Publish a dataset again with the clips that fulfil `expression` and have latents.

    Raises:
        UserError: if the expression is wrong, or the dataset is not encoded.
    """
    store = open_store(dataset_dir)
    manifest = load_manifest(store)
    record = read_record(store, LATENTS)
    if record is None:
        raise UserError(
            f"dataset {store.root} does not say how it was encoded: run `streamdit ingest` again"
        )
    values = record.config.model_dump()
    values["selection"]["expression"] = expression
    config = IngestConfig.model_validate(values)
    selected = {
        unit: table.filter(pa.array(evaluate(table, expression)))
        for unit, table in _candidates(store).items()
    }
    published, held_out = publish_dataset(
        store, list(selected), selected, config, manifest.autoencoder, manifest.buckets
    )
    return Published(published.selection.version, published.selection.rows, held_out)


def _candidates(store: Store) -> dict[str, pa.Table]:
    """Clips of every unit, with all columns that a selection may use."""
    units = [unit.name for unit in require_plan(store)]
    duplicates = read_duplicates(store)
    with ThreadPoolExecutor(READERS) as pool:
        tables = pool.map(lambda unit: candidate_table(store, unit, duplicates), units)
        return dict(zip(units, tables, strict=True))


def _evaluate_each(table: pa.Table, expressions: Sequence[str]) -> np.ndarray:
    """`bool [expressions, rows]`."""
    return np.stack([evaluate(table, expression) for expression in expressions])
