"""What a dataset holds, in numbers: read from its tables, no payload is touched."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import duplicate_table
from pipeline.ledger import READERS, STAGE_KINDS, Ledger, Marker
from pipeline.plan import require_unit_names
from pipeline.schema import (
    ANNOTATION_SCHEMA,
    CLIP_SCHEMA,
    FOLDERS,
    MANIFEST_FILE,
    SOURCE_SCHEMA,
    FileKind,
    Manifest,
    load_manifest,
    read_dead_letters,
    read_tables,
)
from pipeline.settings import read_record
from pipeline.shards import read_table
from pipeline.store import DatasetPath, Store, open_store
from pipeline.threads import map_in_order

ADDRESSING = ("start_s", "end_s", "fps", "scene_start_s", "scene_end_s")
"""Numbers of a clip that are no scores."""


@dataclass(frozen=True)
class StageState:
    """How far a stage is."""

    name: str
    units: int
    done: int
    counters: dict[str, float]
    """Totals over the units that are done."""


@dataclass(frozen=True)
class DeadReason:
    """Dead letters of one kind."""

    stage: str
    error_class: str
    count: int
    message: str
    """Of one of them."""
    uri: str
    """Of the same."""


@dataclass(frozen=True)
class Overview:
    """A dataset at a glance."""

    root: str
    stages: tuple[StageState, ...]
    sources: pa.Table
    """See :data:`pipeline.schema.SOURCE_SCHEMA`."""
    clips: pa.Table
    """Clips with their annotations where there are such, ordered by clip id."""
    selected: pa.Table | None
    """Index of what one trains on, if the dataset is complete."""
    manifest: Manifest | None
    dead: tuple[DeadReason, ...]
    """The commonest first."""
    bytes: dict[str, int]
    """Folder to bytes."""

    @property
    def video_s(self) -> float:
        """Seconds of video in the sources."""
        return float(pc.sum(self.sources["duration_s"]).as_py() or 0.0)

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that clips have."""
        fields = (field for field in self.clips.schema if pa.types.is_floating(field.type))
        names = (field.name for field in fields if field.name not in ADDRESSING)
        return tuple(name for name in names if self.clips[name].null_count < len(self.clips))

    @property
    def statuses(self) -> Counter[str]:
        """Clips by the status of their caption; empty before `annotate`."""
        if "caption_status" not in self.clips.column_names:
            return Counter()
        return _count(pc.fill_null(self.clips["caption_status"], "none"))

    @property
    def buckets(self) -> Counter[str]:
        """Clips by bucket."""
        return _count(self.clips["bucket"])

    @property
    def kept(self) -> np.ndarray:
        """For each clip whether it is selected, `[clips]` bool; all where nothing is selected."""
        if self.selected is None:
            return np.ones(len(self.clips), bool)
        found = pc.is_in(self.clips["clip_id"], value_set=self.selected["clip_id"])
        return found.to_numpy()

    def thresholds(self, score: str) -> list[float]:
        """Numbers that the selection compares a score with."""
        return thresholds(self.manifest.selection.expression, score) if self.manifest else []


def read_overview(dataset_dir: DatasetPath) -> Overview:
    """Read the tables of a dataset, as far as it is.

    Raises:
        UserError: if there is no dataset.
    """
    store = open_store(dataset_dir)
    units = require_unit_names(store)
    manifest = load_manifest(store) if store.exists(MANIFEST_FILE) else None
    return Overview(
        root=store.root,
        # The search for duplicates goes over all units at once, within curate.
        stages=tuple(
            _stage(store, stage, units) for stage in STAGE_KINDS if stage != duplicate_table.STAGE
        ),
        sources=_table(store, "source", SOURCE_SCHEMA),
        clips=_annotated(store),
        selected=pq.read_table(store.source(manifest.selection.path)) if manifest else None,
        manifest=manifest,
        dead=tuple(_dead_reasons(store)),
        bytes=_bytes(store),
    )


def _count(column: pa.ChunkedArray) -> Counter[str]:
    """How often each value occurs."""
    return Counter({row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()})


def find_clip(dataset_dir: DatasetPath, clip_id: str) -> dict[str, Any] | None:
    """The row of a clip, annotated if it is, by its id or the beginning of it.

    Raises:
        UserError: if there is no dataset.
    """
    store = open_store(dataset_dir)
    curated, annotated = Ledger(store, "curate"), Ledger(store, "annotate")

    def look(unit: str) -> list[tuple[str, str]]:
        ids = _rows(store, curated.read(unit), "clip", _ids_of(CLIP_SCHEMA))["clip_id"]
        return [(found, unit) for found in ids.filter(pc.starts_with(ids, clip_id)).to_pylist()]

    places = map_in_order(look, require_unit_names(store), READERS)
    place = min((place for found in places for place in found), default=None)
    if place is None:
        return None
    found, unit = place
    row: dict[str, Any] = {}
    for ledger, kind, schema in (
        (curated, "clip", CLIP_SCHEMA),
        (annotated, "annotation", ANNOTATION_SCHEMA),
    ):
        rows = _rows(store, ledger.read(unit), kind, schema)
        for values in rows.filter(pc.equal(rows["clip_id"], found)).to_pylist():
            row |= values
    return row


def _ids_of(schema: pa.Schema) -> pa.Schema:
    return pa.schema([schema.field("clip_id")])


def _rows(store: Store, marker: Marker | None, kind: FileKind, schema: pa.Schema) -> pa.Table:
    """Rows of the tables of one kind of a unit; none where the stage has not done it."""
    return read_table(store, marker, kind, schema) if marker else schema.empty_table()


def stage_settings(dataset_dir: DatasetPath) -> dict[str, dict[str, Any]]:
    """Settings that each stage of a dataset was made with."""
    store = open_store(dataset_dir)
    records = {stage: read_record(store, stage) for stage in STAGE_KINDS}
    return {stage: record.settings for stage, record in records.items() if record}


def thresholds(expression: str, name: str) -> list[float]:
    """Numbers that an expression compares a column with."""
    found: set[float] = set()
    for node in ast.walk(ast.parse(expression.strip(), mode="eval")):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, right in pairwise(sides):
                for column, value in ((left, right), (right, left)):
                    if isinstance(column, ast.Name) and column.id == name:
                        found |= _number(value)
    return sorted(found)


def _number(node: ast.expr) -> set[float]:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return set()
    return {float(value)} if isinstance(value, (int, float)) else set()


def _stage(store: Store, stage: str, units: list[str]) -> StageState:
    markers = [marker for _, marker in Ledger(store, stage).each(units)]
    totals: Counter[str] = Counter()
    for marker in markers:
        totals.update(marker.counters)
    return StageState(stage, len(units), len(markers), dict(totals))


def _table(store: Store, kind: str, schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *read_tables(store, FOLDERS[kind], schema)])


def _annotated(store: Store) -> pa.Table:
    """Clips, with the annotations of those that have them."""
    clips = _table(store, "clip", CLIP_SCHEMA)
    notes = _table(store, "annotation", ANNOTATION_SCHEMA)
    if len(notes):
        clips = clips.join(notes, "clip_id", join_type="left outer")
    return clips.sort_by("clip_id").combine_chunks()


def _dead_reasons(store: Store) -> list[DeadReason]:
    rows = read_dead_letters(store).to_pylist()
    examples = {(row["stage"], row["error_class"]): row for row in reversed(rows)}
    counts = Counter((row["stage"], row["error_class"]) for row in rows).most_common()
    return [
        DeadReason(*key, count, examples[key]["message"], examples[key]["uri"])
        for key, count in counts
    ]


def _bytes(store: Store) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for path, size in store.files().items():
        sizes[path.split("/", 1)[0] if "/" in path else "."] += size
    return dict(sizes)
