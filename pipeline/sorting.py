"""Rows in the order of the selection index, where there are more than memory should hold."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

ORDER = [("bucket", "ascending"), ("clip_id", "ascending")]
PREFIX = 2
"""Digits of a clip's id by which the clips of a bucket are divided, into 256 shares."""

Key = tuple[str, str]
"""Bucket, and beginning of an id."""


def sorted_rows(tables: Iterable[pa.Table], rows_at_once: int) -> Iterator[pa.Table]:
    """All rows of `tables` by (bucket, clip_id), in portions.

    They are sorted as many as `rows_at_once` together and laid down on this machine's disk; then
    what has the same bucket and beginning of its id is merged, share by share.

    Args:
        tables: tables of one schema, with columns `bucket` and `clip_id` (hexadecimal).
        rows_at_once: rows to hold in memory.
    """
    with tempfile.TemporaryDirectory(prefix="streamdit-sort-") as folder:
        shares: dict[Key, list[tuple[Path, int]]] = defaultdict(list)
        for number, portion in enumerate(_portions(tables, rows_at_once)):
            path = Path(folder) / f"{number}.arrow"
            for batch, key in enumerate(_lay_down(portion, path)):
                shares[key].append((path, batch))
        for key in sorted(shares):
            share = pa.Table.from_batches([_read(*place) for place in shares[key]])
            yield share.sort_by(ORDER).combine_chunks()


def in_groups(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` each and one of the rest, however they were cut before."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= rows:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, rows).combine_chunks()
            waiting, count = [joined.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


def _portions(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Tables joined until there are so many rows, or no more."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        if count >= rows:
            yield pa.concat_tables(waiting)
            waiting, count = [], 0
    if count:
        yield pa.concat_tables(waiting)


def _lay_down(portion: pa.Table, path: Path) -> Iterator[Key]:
    """Write rows sorted, a record batch for each share; yields the shares in order."""
    ordered = portion.sort_by(ORDER).combine_chunks()
    prefixes = pc.utf8_slice_codeunits(ordered["clip_id"], 0, PREFIX)
    keys = pc.binary_join_element_wise(ordered["bucket"], prefixes, "/").combine_chunks()
    runs = pc.run_end_encode(keys)
    first = 0
    with pa.ipc.new_file(path, ordered.schema) as writer:
        for end, name in zip(runs.run_ends.to_pylist(), runs.values.to_pylist(), strict=True):
            writer.write_table(ordered.slice(first, end - first))
            first = end
            bucket, _, prefix = name.rpartition("/")
            yield bucket, prefix


def _read(path: Path, batch: int) -> pa.RecordBatch:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(batch)
