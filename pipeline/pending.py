"""What of a unit is encoded already, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.annotate import require_marker
from pipeline.config import IngestConfig
from pipeline.dead_letters import DeadLetter, read_unit_dead_letters
from pipeline.graph import Row
from pipeline.ledger import MAX_ATTEMPTS, Ledger, Marker, fingerprint
from pipeline.schema import ANNOTATION_SCHEMA, CLIP_SCHEMA
from pipeline.select import select_rows
from streamdit.config import AutoencoderIdentity
from streamdit.errors import UserError

REVISION = 1
"""Raised when the code changes what it encodes, so that old units are done again."""


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of what latents and texts depend on, apart from the clips themselves."""

    latents: str
    text_base: str

    @staticmethod
    def of(config: IngestConfig, identity: AutoencoderIdentity) -> Fingerprints:
        """Hashes for one configuration and autoencoder."""
        latents = [
            REVISION,
            identity.sha256,
            config.clip.bucket,
            config.clip.fps,
            config.encode,
            config.shards.model_dump(exclude={"text_dtype"}),
            config.threads,
        ]
        texts = [
            REVISION,
            config.text_encoders,
            config.shards.model_dump(exclude={"latent_dtype"}),
            config.encode.batch,
            config.threads,
        ]
        return Fingerprints(fingerprint("latents", *latents), fingerprint("text", *texts))

    def text(self, captions: Iterable[Sequence[str]]) -> str:
        """Hash for the text shards of these (shard, clip id, caption, caption model) rows."""
        return fingerprint(self.text_base, [list(row) for row in captions])


def unit_table(dataset: Path, unit: str) -> pa.Table:
    """Clips of a unit with their annotations, ordered by clip id.

    Raises:
        UserError: if the unit is not curated or annotated, or was curated again since.
    """
    clips = _read(dataset, require_marker(dataset, "curate", unit), "clip", CLIP_SCHEMA)
    notes = _read(
        dataset, require_marker(dataset, "annotate", unit), "annotation", ANNOTATION_SCHEMA
    )
    if clips["clip_id"] != notes["clip_id"]:
        raise UserError(
            f"dataset {dataset} has annotations of other clips (unit {unit}): run "
            "`streamdit ingest --only annotate` again"
        )
    for name in ANNOTATION_SCHEMA.names[1:]:
        clips = clips.append_column(ANNOTATION_SCHEMA.field(name), notes[name])
    return clips


def select_unit(dataset: Path, unit: str, config: IngestConfig) -> pa.Table:
    """Clips of a unit that the selection keeps and that have the configured shape."""
    table = unit_table(dataset, unit)
    clips = select_rows(table, config.selection.expression)
    buckets = set(clips["bucket"].to_pylist())
    if buckets - {config.clip.bucket}:
        raise UserError(
            f"dataset {dataset} was curated for clips of {', '.join(sorted(buckets))}, but the "
            f"configuration says {config.clip.bucket}: use the same `clip` for all stages, or run "
            "`streamdit ingest --only curate` again"
        )
    return clips


def _read(dataset: Path, marker: Marker, kind: str, schema: pa.Schema) -> pa.Table:
    paths = [record.path for record in marker.files if record.kind == kind]
    tables = [pq.read_table(dataset / path, schema=schema) for path in paths]
    return pa.concat_tables([schema.empty_table(), *tables]).sort_by("clip_id").combine_chunks()


@dataclass(frozen=True)
class UnitWork:
    """What is there of a unit, and what is missing."""

    unit: str
    latents: Marker | None
    """Marker of latents that are still right; none if the unit is to be encoded afresh."""
    stored: list[tuple[str, list[str]]]
    """Latent shards that are still right, each with its clip ids in order."""
    dead: list[DeadLetter]
    """Clips that could not be decoded earlier."""
    missing: list[Row]
    """Selected clips that have no latent yet."""
    wanted: Fingerprints
    captions: dict[str, tuple[str, str]]
    """Clip id to caption and its origin."""
    text: Marker | None

    @staticmethod
    def find(dataset: Path, unit: str, selected: pa.Table, wanted: Fingerprints) -> UnitWork:
        """Compare the markers of `unit` with what it should be."""
        latents = Ledger(dataset, "latents").read_matching(unit, wanted.latents)
        files = latents.files if latents else ()
        stored = [(record.path, shard_clip_ids(dataset / record.path)) for record in files]
        dead = read_unit_dead_letters(dataset, "latents", unit) if latents else []
        settled = {clip_id for _, ids in stored for clip_id in ids}
        given_up = {
            (letter.source_id, letter.start_s)
            for letter in dead
            if not letter.retryable or letter.attempts >= MAX_ATTEMPTS
        }
        missing = [
            row
            for row in selected.to_pylist()
            if row["clip_id"] not in settled and (row["source_id"], row["start_s"]) not in given_up
        ]
        table = unit_table(dataset, unit).select(["clip_id", "caption", "caption_model"])
        captions = {
            row["clip_id"]: (row["caption"], row["caption_model"]) for row in table.to_pylist()
        }
        work = UnitWork(unit, latents, stored, dead, missing, wanted, captions, None)
        marker = Ledger(dataset, "text").read_matching(unit, wanted.text(work.text_content()))
        return replace(work, text=marker)

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be encoded."""
        return self.latents is not None and self.text is not None and not self.missing

    @property
    def counters(self) -> dict[str, float]:
        """Totals for summaries."""
        return {"clips": sum(len(ids) for _, ids in self.stored), "dead": len(self.dead)}

    def text_content(self) -> list[tuple[str, str, str, str]]:
        """(latent shard, clip id, caption, caption model) of every stored clip, in order."""
        return [
            (path, clip_id, *self.captions.get(clip_id, ("", "")))
            for path, ids in self.stored
            for clip_id in ids
        ]


def shard_clip_ids(path: Path) -> list[str]:
    """Clip ids of a shard, in order; no payload is read."""
    return pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist()
