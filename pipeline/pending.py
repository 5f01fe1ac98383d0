"""What of a unit is encoded already, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from pipeline.dead_letters import DeadLetter, quarantined, read_unit_dead_letters
from pipeline.duplicate_table import join_duplicates, read_duplicates
from pipeline.graph import Row
from pipeline.ledger import (
    MAX_ATTEMPTS,
    STAGE_KINDS,
    Ledger,
    Marker,
    Wanted,
    fingerprint,
    require_markers,
)
from pipeline.schema import ANNOTATION_SCHEMA, CLIP_SCHEMA
from pipeline.select import select_rows
from pipeline.shards import read_table
from pipeline.store import Store
from streamdit.config import AutoencoderIdentity
from streamdit.errors import UserError

REVISION = 1
"""Raised when the code changes what it encodes, so that old units are done again."""

LATENTS, TEXT = "latents", "text"
CAPTIONS_INPUT = "captions"
assert {LATENTS, TEXT} < set(STAGE_KINDS)


def latent_settings(config: IngestConfig, identity: AutoencoderIdentity) -> dict[str, Any]:
    """What latents depend on, apart from the clips themselves."""
    return {
        "revision": REVISION,
        "autoencoder": identity.sha256,
        "clip": {"buckets": [s.name for s in config.clip.shapes], "fps": config.clip.fps},
        "encode": {
            "batch": config.encode.batch,
            "device": "gpu" if config.encode.autoencoder_gpus else "cpu",
        },
        "shards": config.shards.model_dump(mode="json", exclude={"text_dtype"}),
        "threads": config.threads,
    }


def text_settings(config: IngestConfig) -> dict[str, Any]:
    """What text states depend on, apart from the captions."""
    return {
        "revision": REVISION,
        "text_encoders": {
            encoder.name: encoder.model_dump(mode="json", exclude={"name"})
            for encoder in config.text_encoders
        },
        "encode": {
            "text_batch": config.encode.text_batch,
            "text_device": "gpu" if config.encode.text_gpus else "cpu",
        },
        "shards": config.shards.model_dump(mode="json", exclude={"latent_dtype"}),
        "threads": config.threads,
    }


def unit_table(store: Store, unit: str) -> pa.Table:
    """Clips of a unit with their annotations, ordered by clip id.

    Raises:
        UserError: if the unit is not curated or annotated, or was curated again since.
    """
    curated = require_markers(store, "curate", [unit])[unit]
    annotated = require_markers(store, "annotate", [unit])[unit]
    clips = read_table(store, curated, "clip", CLIP_SCHEMA)
    notes = read_table(store, annotated, "annotation", ANNOTATION_SCHEMA)
    if clips["clip_id"] != notes["clip_id"]:
        raise UserError(
            f"dataset {store.root} has annotations of other clips (unit {unit}): run "
            "`streamdit ingest --only annotate` again"
        )
    for name in ANNOTATION_SCHEMA.names[1:]:
        clips = clips.append_column(ANNOTATION_SCHEMA.field(name), notes[name])
    return clips


def candidate_table(store: Store, unit: str) -> pa.Table:
    """Clips of a unit with every column that a selection may use."""
    return join_duplicates(unit_table(store, unit), read_duplicates(store, unit))


def select_unit(store: Store, unit: str, config: IngestConfig) -> pa.Table:
    """Clips of a unit that the selection keeps.

    Raises:
        UserError: if there are clips of a bucket that is not configured.
    """
    clips = select_rows(candidate_table(store, unit), config.selection.expression)
    buckets = set(clips["bucket"].to_pylist())
    wanted = [shape.name for shape in config.clip.shapes]
    if not buckets <= set(wanted):
        raise UserError(
            f"dataset {store.root} was curated for clips of {', '.join(sorted(buckets))}, but the "
            f"configuration says {', '.join(wanted)}: use the same `clip` for all stages, or run "
            "`streamdit ingest --only curate --replace` again"
        )
    return clips


@dataclass(frozen=True)
class LatentWork:
    """What there is of a unit's latents, and what is missing."""

    unit: str
    marker: Marker | None
    """Marker of latents that are still right; none if the unit is to be encoded afresh."""
    dead: list[DeadLetter]
    """Clips that could not be decoded earlier."""
    missing: list[Row]
    """Selected clips that have no latent yet."""

    @staticmethod
    def find(
        store: Store, unit: str, selected: pa.Table, wanted: Wanted, retry_dead: bool = False
    ) -> LatentWork:
        """Compare the marker of `unit` with what it should be."""
        marker = Ledger(store, LATENTS).read_matching(unit, wanted)
        stored = {clip_id for _, ids in stored_clips(store, marker) for clip_id in ids}
        dead = read_unit_dead_letters(store, LATENTS, unit) if marker else []
        given_up = {
            (letter.source_id, letter.start_s)
            for letter in dead
            if not retry_dead and (not letter.retryable or letter.attempts >= MAX_ATTEMPTS)
        }
        missing = [
            row
            for row in selected.to_pylist()
            if row["clip_id"] not in stored and (row["source_id"], row["start_s"]) not in given_up
        ]
        return LatentWork(unit, marker, dead, missing)

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be encoded."""
        return self.marker is not None and not self.missing

    @property
    def counters(self) -> dict[str, float]:
        """Totals for summaries."""
        return dict(self.marker.counters) if self.marker else {}


def stored_clips(store: Store, marker: Marker | None) -> list[tuple[str, list[str]]]:
    """Shards that a marker lists, each with its clip ids in order; no payload is read."""
    files = marker.files if marker else ()
    return [
        (
            record.path,
            pq.read_table(store.source(record.path), columns=["clip_id"])["clip_id"].to_pylist(),
        )
        for record in files
    ]


def quarantined_sources(store: Store, unit: str) -> set[str | None]:
    """Sources whose decoder crashed or hung in an earlier stage, or with an earlier clip."""
    return set(quarantined(store, ["annotate", LATENTS], unit))


@dataclass(frozen=True)
class TextWork:
    """The captions whose states belong beside a unit's latents."""

    unit: str
    shards: list[tuple[str, list[Row]]]
    """Latent shards, each with `clip_id`, `caption` and `caption_model` of its clips in order."""

    @staticmethod
    def find(store: Store, unit: str) -> TextWork:
        """Read captions of the clips that are encoded."""
        marker = require_markers(store, LATENTS, [unit])[unit]
        columns = ["clip_id", "caption", "caption_model"]
        known = {row["clip_id"]: row for row in unit_table(store, unit).select(columns).to_pylist()}
        shards = [
            (path, [known.get(clip_id, _no_caption(clip_id)) for clip_id in ids])
            for path, ids in stored_clips(store, marker)
        ]
        return TextWork(unit, shards)

    def wanted(self, settings: str) -> Wanted:
        """What the text shards of these captions depend on."""
        content = [[path, [list(row.values()) for row in rows]] for path, rows in self.shards]
        return Wanted(settings=settings, inputs={CAPTIONS_INPUT: fingerprint(content)})


def _no_caption(clip_id: str) -> Row:
    """For a clip that is encoded but that the clip table does not list any more."""
    return {"clip_id": clip_id, "caption": "", "caption_model": ""}


def nothing_selected(store: Store, config: IngestConfig) -> UserError:
    """Why there is nothing to encode."""
    return UserError(
        f"selection {config.selection.expression!r} keeps no clip of {store.root}: loosen "
        "selection.expression"
    )
