"""Choosing again among the clips of a dataset: a new index in seconds, nothing encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import IngestConfig
from pipeline.duplicate_table import require_duplicates
from pipeline.index import publish_dataset
from pipeline.ledger import READERS
from pipeline.pending import LATENTS, candidate_table
from pipeline.plan import require_unit_names
from pipeline.schema import load_manifest
from pipeline.select import clauses_of, evaluate, select_rows
from pipeline.settings import read_record
from pipeline.store import DatasetPath, open_store
from pipeline.threads import map_in_order
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
    store = open_store(dataset_dir)
    units = require_unit_names(store)
    require_duplicates(store, units)
    counts = map_in_order(
        lambda unit: _count(candidate_table(store, unit), clauses), units, READERS
    )
    clips, selected, *rest = sum(counts).tolist()
    drops, alone, unknown = np.reshape(rest, (3, -1)).tolist()
    return Choice(clips, selected, tuple(map(Clause, clauses, drops, alone, unknown)))


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
    units = require_unit_names(store)
    require_duplicates(store, units)
    published = publish_dataset(
        store,
        units,
        lambda unit: select_rows(candidate_table(store, unit), expression),
        config,
        manifest.autoencoder,
        manifest.buckets,
    )
    selection = published.manifest.selection
    return Published(selection.version, selection.rows, published.held_out)


def _count(table: pa.Table, clauses: Sequence[str]) -> np.ndarray:
    """Of a table its clips, those selected; and per clause what it drops, alone, and unknown."""
    fails = ~_evaluate_each(table, clauses)
    unknown = ~_evaluate_each(table, [f"({clause}) is not None" for clause in clauses])
    failures = fails.sum(axis=0)
    rows = (fails, fails & (failures == 1), unknown)
    parts = [[table.num_rows, (failures == 0).sum()], *(row.sum(axis=1) for row in rows)]
    return np.concatenate(parts)


def _evaluate_each(table: pa.Table, expressions: Sequence[str]) -> np.ndarray:
    """`bool [expressions, rows]`."""
    return np.stack([evaluate(table, expression) for expression in expressions])
