"""The table of near duplicates of a dataset, which covers all its sources together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.duplicates import duplicate_rows
from pipeline.ledger import (
    CLIPS_INPUT,
    READERS,
    Ledger,
    Marker,
    Wanted,
    fingerprint,
    require_markers,
)
from pipeline.schema import CLIP_SCHEMA, DUPLICATE_SCHEMA, FOLDERS, SOURCE_SCHEMA, FileRecord
from pipeline.shards import read_table, write_table
from pipeline.store import Store

STAGE = "duplicates"
ALL_UNITS = "all"
"""Pseudo unit of the stage, whose one table covers the whole dataset."""
DUPLICATES_FILE = f"{FOLDERS['duplicate']}/duplicate-{ALL_UNITS}.parquet"
BITS_INPUT = "bits"
REVISION = 1


def update_duplicates(store: Store, units: Sequence[str], max_bits: int) -> int:
    """Find the near duplicates among all clips, unless the table is up to date.

    Args:
        store: dataset whose units are curated.
        units: their names.
        max_bits: bits of `phash` in which near duplicates differ at most.

    Returns:
        Clips that are near duplicates of another one that stays.
    """
    ledger = Ledger(store, STAGE)
    markers = require_markers(store, "curate", units)
    tables = sorted(r.sha256 for marker in markers.values() for r in marker.files)
    inputs = {CLIPS_INPUT: fingerprint(tables), BITS_INPUT: str(max_bits)}
    wanted = Wanted(settings=fingerprint(REVISION), inputs=inputs)
    if ledger.read_matching(ALL_UNITS, wanted) is None:
        clips = _read_hashes(store, [markers[unit] for unit in units])
        pixels = clips.pop("pixels")
        rows = list(duplicate_rows(clips, pixels, max_bits))
        ledger.begin(ALL_UNITS, wanted)
        record = write_table(store, DUPLICATES_FILE, "duplicate", rows, DUPLICATE_SCHEMA)
        ledger.finish(ALL_UNITS, wanted, [record])
    return pc.sum(read_duplicates(store)["duplicate"]).as_py() or 0


def refresh_duplicates(store: Store, units: Sequence[str]) -> None:
    """Bring the table, where there is one, up to the clips that `units` hold now."""
    if marker := Ledger(store, STAGE).read(ALL_UNITS):
        update_duplicates(store, units, int(marker.inputs[BITS_INPUT]))


def duplicates_records(store: Store) -> tuple[FileRecord, ...]:
    """The table's entry in a manifest; none where there is no table."""
    marker = Ledger(store, STAGE).read(ALL_UNITS)
    return marker.files if marker else ()


def read_duplicates(store: Store) -> pa.Table:
    """The table (:data:`pipeline.schema.DUPLICATE_SCHEMA`); empty where there is none."""
    try:
        return pq.read_table(store.source(DUPLICATES_FILE), schema=DUPLICATE_SCHEMA)
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


def _read_hashes(store: Store, markers: Sequence[Marker]) -> dict[str, list]:
    """Columns `clip_id`, `phash` and `pixels` (of the source) of all clips."""
    columns: dict[str, list] = {"clip_id": [], "phash": [], "pixels": []}
    with ThreadPoolExecutor(READERS) as pool:
        for part in pool.map(lambda marker: _unit_hashes(store, marker), markers):
            for name, values in part.items():
                columns[name].extend(values)
    return columns


def _unit_hashes(store: Store, marker: Marker) -> dict[str, list]:
    clips = read_table(store, marker, "clip", CLIP_SCHEMA)
    sources = read_table(store, marker, "source", SOURCE_SCHEMA, key="source_id")
    sizes = pc.multiply(sources["width"].cast(pa.int64()), sources["height"].cast(pa.int64()))
    places = pc.index_in(clips["source_id"], value_set=sources["source_id"])
    return {
        "clip_id": clips["clip_id"].to_pylist(),
        "phash": clips["phash"].to_pylist(),
        "pixels": sizes.take(places).to_pylist(),
    }
