"""Writing Parquet: small tables at once, shards row by row with bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ShardConfig
from pipeline.ledger import partial_path, publish
from pipeline.schema import FOLDERS, FileKind, FileRecord
from streamdit.hashing import file_sha256

NO_BUCKET = "all"


def file_name(kind: FileKind, unit: str, bucket: str = NO_BUCKET, part: int = 0) -> str:
    """Path of a unit's file, relative to the dataset directory."""
    return f"{FOLDERS[kind]}/{kind}-{unit}-{bucket}-{part:05d}.parquet"


def bucket_and_part(path: str) -> tuple[str, int]:
    """Bucket and part of a path that :func:`file_name` made."""
    _, _, bucket, part = Path(path).stem.split("-")
    return bucket, int(part)


def write_table(
    dataset_dir: Path, path: str, kind: FileKind, rows: list[dict[str, Any]], schema: pa.Schema
) -> FileRecord:
    """Write a small table in one row group, atomically."""
    target = dataset_dir / path
    with open_parquet(target, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    publish(partial_path(target), target)
    return describe_file(dataset_dir, path, kind, len(rows))


def open_parquet(target: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Writer of the hidden partial file of `target`.

    Dictionaries and statistics are off: they would make a second copy of payloads in memory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    return pq.ParquetWriter(
        partial_path(target),
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_statistics=False,
    )


def describe_file(dataset_dir: Path, path: str, kind: FileKind, rows: int) -> FileRecord:
    """Size and hash of a published file."""
    target = dataset_dir / path
    return FileRecord(
        path=path, kind=kind, rows=rows, bytes=target.stat().st_size, sha256=file_sha256(target)
    )


class ShardWriter:
    """Writes the rows of one unit and bucket to shards, `part` by `part`.

    A row group is written when its payload reaches `row_group_mb`, a file is finished when its
    payload reaches `shard_mb`; so memory is bounded by a row group, and files are published whole.
    """

    def __init__(
        self,
        dataset_dir: Path,
        kind: FileKind,
        unit: str,
        bucket: str,
        schema: pa.Schema,
        config: ShardConfig,
        first_part: int = 0,
    ) -> None:
        self.dataset_dir = dataset_dir
        self.kind = kind
        self.unit = unit
        self.bucket = bucket
        self.schema = schema
        self.row_group_bytes = config.row_group_mb * 1e6
        self.shard_bytes = config.shard_mb * 1e6
        self.part = first_part
        self.records: list[FileRecord] = []
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
        elif self._writer is not None:
            self._writer.close()

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
        if self._writer is None:
            return
        self._writer.close()
        path = file_name(self.kind, self.unit, self.bucket, self.part)
        publish(partial_path(self.dataset_dir / path), self.dataset_dir / path)
        self.records.append(describe_file(self.dataset_dir, path, self.kind, self._written))
        self._writer = None
        self.part += 1
        self._shard = self._written = 0

    def _flush(self) -> None:
        """Write the rows collected so far as one row group."""
        if not self._rows:
            return
        if self._writer is None:
            path = file_name(self.kind, self.unit, self.bucket, self.part)
            self._writer = open_parquet(self.dataset_dir / path, self.schema)
        table = pa.Table.from_pylist(self._rows, schema=self.schema)
        self._writer.write_table(table, row_group_size=len(self._rows))
        self._written += len(self._rows)
        self._rows = []
        self._group = 0
