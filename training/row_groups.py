"""Rows of Parquet shards by their address, with tensors as views of what was read."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from isal import isal_zlib
from torch import Tensor

from pipeline.schema import encode_tensor
from pipeline.store import DatasetPath, Store, open_store
from streamdit.errors import UserError

CACHE_BYTES = 512 << 20
MOST_FOOTERS = 64
"""Footers of files that are kept: read and parsed once, not for every row group."""


class RowGroups:
    """Row groups of Parquet shards, read whole and kept while they fit a budget of bytes.

    Args:
        directory: folder or `s3://` prefix that the addresses are relative to.
        budget_bytes: how much to keep.
    """

    def __init__(self, directory: DatasetPath | Store, budget_bytes: int = CACHE_BYTES) -> None:
        self.store = open_store(directory)
        self.budget_bytes = budget_bytes
        self.read_bytes = 0
        self._cache: OrderedDict[tuple[str, int], pa.RecordBatch] = OrderedDict()
        self._bytes = 0
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    def __reduce__(self) -> tuple[type[RowGroups], tuple[Store, int]]:
        """Travel to another process without what is cached."""
        return RowGroups, (self.store, self.budget_bytes)

    def row(self, file: str, group: int, row: int) -> dict[str, Any]:
        """One row, by its address; payloads as read-only buffers over what was read."""
        batch = self._batch(file, group)
        return {
            field.name: _payload(batch[index], row)
            if pa.types.is_large_binary(field.type)
            else batch[index][row].as_py()
            for index, field in enumerate(batch.schema)
        }

    def _batch(self, file: str, group: int) -> pa.RecordBatch:
        key = (file, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        with self._open(file) as parquet:
            (batch,) = parquet.read_row_group(group).combine_chunks().to_batches()
        self._cache[key] = batch
        self._bytes += batch.nbytes
        self.read_bytes += batch.nbytes
        while self._bytes > self.budget_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.nbytes
        return batch

    def _open(self, file: str) -> pq.ParquetFile:
        footer = self._footers.pop(file, None)
        # pre_buffer holds whole files of wide binary columns in memory; one group is enough.
        # A mapped file saves one copy of everything; objects of a store are not mapped.
        parquet = pq.ParquetFile(
            self.store.source(file), metadata=footer, pre_buffer=False, memory_map=True
        )
        self._footers[file] = parquet.metadata
        if len(self._footers) > MOST_FOOTERS:
            self._footers.popitem(last=False)
        return parquet


def _payload(column: pa.LargeBinaryArray, row: int) -> pa.Buffer:
    """Bytes of one value, without a copy (which `as_py` and `as_buffer` make)."""
    _, offsets, data = column.buffers()
    start, end = np.frombuffer(offsets, np.int64, count=2, offset=8 * (column.offset + row))
    return data.slice(start, end - start)


def read_tensor(
    row: dict[str, Any],
    column: str,
    where: str,
    remedy: str = "`streamdit dataset repair` on the data set makes it anew",
) -> Tensor:
    """A tensor column of a shard row, after checking its CRC.

    The tensor looks at the row group's memory: compute with it, but never write to it.

    Args:
        row: from :meth:`RowGroups.row`.
        column: its name.
        where: the file, for the message.
        remedy: what mends a damaged file, for the message.

    Raises:
        UserError: if the bytes are not those that were written.
    """
    payload = row[column]
    if isal_zlib.crc32(payload) != row[f"{column}_crc"]:
        raise UserError(
            f"{where}: column {column} of clip {row['clip_id']} is damaged (CRC differs); {remedy}"
        )
    dtype = getattr(torch, row[f"{column}_dtype"])
    # Not torch.frombuffer, which warns of every buffer that is not to be written to.
    flat = torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), payload.size, [None, payload]))
    return flat.view(dtype).reshape(tuple(row[f"{column}_shape"]))


def tensor_columns(tensor: Tensor, column: str) -> dict[str, Any]:
    """The columns of a tensor in a row, for :func:`read_tensor`."""
    keys = (column, f"{column}_shape", f"{column}_dtype", f"{column}_crc")
    return dict(zip(keys, encode_tensor(tensor), strict=True))
