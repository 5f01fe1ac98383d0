"""The table of near duplicates of a dataset, which covers all its sources together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.duplicates import BYTES, find_duplicates
from pipeline.ledger import (
    CLIPS_INPUT,
    READERS,
    Ledger,
    Marker,
    Wanted,
    fingerprint,
    map_markers,
    require_markers,
)
from pipeline.schema import (
    CLIP_SCHEMA,
    DUPLICATE_SCHEMA,
    FOLDERS,
    ID_TYPE,
    SOURCE_SCHEMA,
    FileRecord,
    id_array,
)
from pipeline.settings import read_record
from pipeline.shards import read_table, write_table
from pipeline.store import Store
from pipeline.threads import map_in_order

STAGE = "duplicates"
ALL_UNITS = "all"
"""Pseudo unit of the stage, whose one table covers the whole dataset."""
DUPLICATES_FILE = f"{FOLDERS['duplicate']}/duplicate-{ALL_UNITS}.parquet"
BITS_INPUT = "bits"
REVISION = 2
ROW_GROUP = 8192
"""Rows of the table that are read to get those of one unit."""


def update_duplicates(store: Store, units: Sequence[str], max_bits: int) -> None:
    """Find the near duplicates among all clips, unless the table is up to date.

    Args:
        store: dataset whose units are curated.
        units: their names.
        max_bits: bits of `phash` in which near duplicates differ at most.

    Raises:
        UserError: if a unit is not curated.
    """
    ledger = Ledger(store, STAGE)
    hashes: list[str] = []
    clips: list[int] = []
    for records in map_markers(store, "curate", units, lambda marker: marker.files):
        hashes += [record.sha256 for record in records]
        clips.append(sum(record.rows for record in records if record.kind == "clip"))
    inputs = {CLIPS_INPUT: fingerprint(sorted(hashes)), BITS_INPUT: str(max_bits)}
    wanted = Wanted(settings=fingerprint(REVISION), inputs=inputs)
    if ledger.read_matching(ALL_UNITS, wanted) is None:
        table = _compare(store, units, clips, max_bits)
        ledger.begin(ALL_UNITS, wanted)
        record = write_table(
            store, DUPLICATES_FILE, "duplicate", table, DUPLICATE_SCHEMA, ROW_GROUP, ["unit"]
        )
        ledger.finish(ALL_UNITS, wanted, [record])


def require_duplicates(store: Store, units: Sequence[str]) -> None:
    """Bring the table up to the clips of `units`, for which a curation may have died too early.

    Raises:
        UserError: if a unit is not curated.
    """
    if record := read_record(store, "curate"):
        update_duplicates(store, units, record.config.scores.duplicate_bits)


def count_duplicates(store: Store) -> int:
    """Clips that are near duplicates of another one that stays."""
    table = pq.read_table(store.source(DUPLICATES_FILE), columns=["duplicate"])
    return pc.sum(table["duplicate"]).as_py() or 0


def duplicates_records(store: Store) -> tuple[FileRecord, ...]:
    """The table's entry in a manifest; none where there is no table."""
    marker = Ledger(store, STAGE).read(ALL_UNITS)
    return marker.files if marker else ()


def read_duplicates(store: Store, unit: str | None = None) -> pa.Table:
    """The table (:data:`pipeline.schema.DUPLICATE_SCHEMA`), or its rows of one unit; may be empty.

    Of a unit no more than its row groups are read.
    """
    chosen = None if unit is None else [("unit", "=", unit)]
    try:
        source = store.source(DUPLICATES_FILE)
        return pq.read_table(source, schema=DUPLICATE_SCHEMA, filters=chosen)
    except FileNotFoundError:
        return DUPLICATE_SCHEMA.empty_table()


def join_duplicates(clips: pa.Table, duplicates: pa.Table) -> pa.Table:
    """`clips` with the columns of the table: not a duplicate, and alone, where it has no row."""
    places = pc.index_in(clips["clip_id"], value_set=duplicates["clip_id"])
    found = duplicates.take(places)
    for name, alone in (("duplicate", False), ("duplicate_of", None), ("duplicates", 1)):
        column = found[name] if alone is None else pc.fill_null(found[name], alone)
        clips = clips.append_column(DUPLICATE_SCHEMA.field(name), column)
    return clips


@dataclass(frozen=True)
class _Clips:
    """What is compared of clips: arrays, for there may be millions."""

    ids: np.ndarray
    """`S16 [n]`."""
    codes: np.ndarray
    """`uint8 [n, 24]`."""
    pixels: np.ndarray
    """`int64 [n]`, of the source's pictures."""


def _compare(store: Store, units: Sequence[str], counts: Sequence[int], max_bits: int) -> pa.Table:
    """Rows of the table, from the clips of all units, of which each has so many."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    clips = _Clips(
        ids=np.empty(total, ID_TYPE),
        codes=np.empty((total, BYTES), np.uint8),
        pixels=np.empty(total, np.int64),
    )
    first = 0
    for part in map_in_order(lambda unit: _unit_clips(store, unit), units, READERS):
        last = first + len(part.ids)
        clips.ids[first:last] = part.ids
        clips.codes[first:last] = part.codes
        clips.pixels[first:last] = part.pixels
        first = last
    assert first == total, "markers and clip tables disagree"
    found = find_duplicates(clips.ids, clips.codes, clips.pixels, max_bits)
    names = np.searchsorted(ends, found.clips, side="right")
    table = pa.table(
        {
            "unit": pa.array(units, pa.string()).take(pa.array(names)),
            "clip_id": _texts(clips.ids[found.clips]),
            "duplicate": found.clips != found.kept,
            "duplicate_of": _texts(clips.ids[found.kept]),
            "duplicates": found.sizes,
        }
    )
    return table.cast(DUPLICATE_SCHEMA).sort_by([("unit", "ascending"), ("clip_id", "ascending")])


def _texts(ids: np.ndarray) -> pa.Array:
    return pa.array(ids, pa.binary()).cast(pa.string())


def _unit_clips(store: Store, unit: str) -> _Clips:
    marker: Marker = require_markers(store, "curate", [unit])[unit]
    clips = read_table(store, marker, "clip", CLIP_SCHEMA)
    sources = read_table(store, marker, "source", SOURCE_SCHEMA, key="source_id")
    sizes = pc.multiply(sources["width"].cast(pa.int64()), sources["height"].cast(pa.int64()))
    places = pc.index_in(clips["source_id"], value_set=sources["source_id"])
    codes = bytes.fromhex("".join(clips["phash"].to_pylist()))
    return _Clips(
        ids=id_array(clips["clip_id"]),
        codes=np.frombuffer(codes, np.uint8).reshape(-1, BYTES),
        pixels=sizes.take(places).to_numpy(),
    )
