"""Stage of `encode`: the captions of a unit to text shards."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pipeline.config import IngestConfig
from pipeline.counters import text_counters
from pipeline.graph import Row, result_row
from pipeline.latents import batches, text_rows
from pipeline.ledger import Ledger, Wanted
from pipeline.pending import TEXT, TextWork
from pipeline.schema import NULL_CLIP_ID, NULL_TEXT_FILE, FileRecord, text_schema
from pipeline.shards import ShardWriter, bucket_and_part, write_table
from pipeline.store import open_store

if TYPE_CHECKING:
    from streamdit.text.base import TextEncoders

NULL_UNIT = "null"
"""Pseudo unit whose text is the empty prompt (classifier-free guidance)."""


class EncodeTexts:
    """Takes a unit, writes a text shard beside each of its latent shards, and its marker.

    The text encoders are loaded when the first unit needs them, and kept.
    """

    def __init__(self, dataset_dir: str, config: IngestConfig) -> None:
        import torch

        torch.set_num_threads(config.threads)
        self.store = open_store(dataset_dir)
        self.config = config

    @functools.cached_property
    def encoders(self) -> TextEncoders:
        """All text encoders, on the device of this actor."""
        from streamdit.text import build_text_encoders

        device = "cuda" if self.config.encode.text_gpus else "cpu"
        return build_text_encoders(self.config.text_encoders, device)

    def __call__(self, row: Row) -> Iterable[Row]:
        """Encode the captions of one unit."""
        if row["unit"] == NULL_UNIT:
            self._encode_null(row["settings"])
            return [result_row(NULL_UNIT, {})]
        work = TextWork.find(self.store, row["unit"])
        ledger, wanted = Ledger(self.store, TEXT), work.wanted(row["settings"])
        ledger.begin(work.unit, wanted)
        records = [self._write(work.unit, path, captions) for path, captions in work.shards]
        counters = text_counters(records)
        ledger.finish(work.unit, wanted, records, counters)
        return [result_row(work.unit, counters)]

    def _write(self, unit: str, latent_file: str, captions: list[Row]) -> FileRecord:
        """Write one text shard; it is never split, so that it keeps its latent shard's name."""
        bucket, part = bucket_and_part(latent_file)
        whole = self.config.shards.model_copy(update={"shard_mb": float("inf")})
        with ShardWriter(
            self.store, "text", unit, bucket, self._schema, whole, iter([part])
        ) as writer:
            for row in self._rows(captions):
                writer.add(row)
        (record,) = writer.records
        return record

    def _rows(self, captions: list[Row]) -> Iterator[Row]:
        import torch

        dtype = getattr(torch, self.config.shards.text_dtype)
        for batch in batches(captions, self.config.encode.text_batch):
            yield from text_rows(self.encoders, batch, dtype)

    @functools.cached_property
    def _schema(self):  # type: ignore[no-untyped-def]
        return text_schema(encoder.name for encoder in self.config.text_encoders)

    def _encode_null(self, settings: str) -> None:
        """Write the states of the empty prompt."""
        row = {"clip_id": NULL_CLIP_ID, "caption": "", "caption_model": ""}
        ledger, wanted = Ledger(self.store, TEXT), Wanted(settings=settings)
        ledger.begin(NULL_UNIT, wanted)
        record = write_table(
            self.store, NULL_TEXT_FILE, "text-null", list(self._rows([row])), self._schema
        )
        ledger.finish(NULL_UNIT, wanted, [record], {})
