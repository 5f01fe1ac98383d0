"""Writing Parquet: small tables at once, shards row by row with bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ShardConfig
from pipeline.ledger import Marker
from pipeline.schema import FOLDERS, FileKind, FileRecord
from pipeline.store import Sink, Store

NO_BUCKET = "all"


def file_name(kind: FileKind, unit: str, bucket: str = NO_BUCKET, part: int = 0) -> str:
    """Path of a unit's file, relative to the dataset directory."""
    return f"{FOLDERS[kind]}/{kind}-{unit}-{bucket}-{part:05d}.parquet"


def bucket_and_part(path: str) -> tuple[str, int]:
    """Bucket and part of a path that :func:`file_name` made."""
    _, _, bucket, part = Path(path).stem.split("-")
    return bucket, int(part)


def free_parts(used: Collection[int]) -> Iterator[int]:
    """Numbers of parts that a unit does not have yet, from the smallest."""
    return (part for part in itertools.count() if part not in used)


def write_table(
    store: Store,
    path: str,
    kind: FileKind,
    rows: pa.Table | list[dict[str, Any]],
    schema: pa.Schema,
    row_group: int | None = None,
    statistics: Sequence[str] = (),
) -> FileRecord:
    """Write a small table atomically.

    Args:
        store: dataset.
        path: file.
        kind: what it holds.
        rows: its rows.
        schema: its columns.
        row_group: rows of a row group; none puts all into one.
        statistics: columns by which row groups are chosen when it is read.
    """
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    sink = store.sink(path)
    with open_parquet(sink.file, schema, statistics=statistics) as writer:
        writer.write_table(table, row_group_size=row_group or max(1, table.num_rows))
    size, digest = sink.finish()
    return FileRecord(path=path, kind=kind, rows=table.num_rows, bytes=size, sha256=digest)


def read_table(
    store: Store, marker: Marker, kind: FileKind, schema: pa.Schema, key: str = "clip_id"
) -> pa.Table:
    """The table of one kind that a marker lists, ordered by `key`."""
    paths = [record.path for record in marker.files if record.kind == kind]
    tables = [pq.read_table(store.source(path), schema=schema) for path in paths]
    return pa.concat_tables([schema.empty_table(), *tables]).sort_by(key).combine_chunks()


def read_rows(store: Store, marker: Marker, kind: FileKind) -> list[dict[str, Any]]:
    """Rows of the tables of one kind that a marker lists."""
    paths = [record.path for record in marker.files if record.kind == kind]
    return [row for path in paths for row in pq.read_table(store.source(path)).to_pylist()]


def open_parquet(
    file: BinaryIO,
    schema: pa.Schema,
    compression: str = "zstd",
    statistics: Sequence[str] = (),
) -> pq.ParquetWriter:
    """Writer into an open file, which it leaves open.

    Dictionaries are off, and statistics but for the columns named: they would make a second copy
    of payloads in memory.
    """
    return pq.ParquetWriter(
        pa.PythonFile(file, mode="w"),
        schema,
        compression=compression,
        compression_level=1 if compression == "zstd" else None,
        use_dictionary=False,
        write_statistics=list(statistics),
    )


class ShardWriter:
    """Writes the rows of one unit and bucket to shards, `part` by `part`.

    A row group is written when its payload reaches `row_group_mb`, a file is finished when its
    payload reaches `shard_mb`; so memory is bounded by a row group, and files are published whole.
    """

    def __init__(
        self,
        store: Store,
        kind: FileKind,
        unit: str,
        bucket: str,
        schema: pa.Schema,
        config: ShardConfig,
        parts: Iterator[int] | None = None,
    ) -> None:
        self.store = store
        self.kind = kind
        self.unit = unit
        self.bucket = bucket
        self.schema = schema
        self.compression = config.compression
        self.row_group_bytes = config.row_group_mb * 1e6
        self.shard_bytes = config.shard_mb * 1e6
        self.parts = parts or itertools.count()
        self.records: list[FileRecord] = []
        self._path = ""
        self._sink: Sink | None = None
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[Mapping[str, Any]] = []
        self._group = self._shard = self._written = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish_shard()
        elif self._sink is not None:
            self._sink.discard()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        size = sum(len(value) for value in row.values() if isinstance(value, bytes))
        self._rows.append(row)
        self._group += size
        self._shard += size
        if self._group >= self.row_group_bytes:
            self._flush()
        if self._shard >= self.shard_bytes:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Publish the file under way, if it has rows; the next row starts another."""
        self._flush()
        if self._writer is None or self._sink is None:
            return
        self._writer.close()
        size, digest = self._sink.finish()
        self.records.append(
            FileRecord(
                path=self._path, kind=self.kind, rows=self._written, bytes=size, sha256=digest
            )
        )
        self._writer = self._sink = None
        self._shard = self._written = 0

    def _flush(self) -> None:
        """Write the rows collected so far as one row group."""
        if not self._rows:
            return
        if self._writer is None:
            self._path = file_name(self.kind, self.unit, self.bucket, next(self.parts))
            self._sink = self.store.sink(self._path)
            self._writer = open_parquet(self._sink.file, self.schema, self.compression)
        table = pa.Table.from_pylist(self._rows, schema=self.schema)
        self._writer.write_table(table, row_group_size=len(self._rows))
        self._written += len(self._rows)
        self._rows = []
        self._group = 0
