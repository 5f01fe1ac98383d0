"""Publishing a dataset: the selection index and, last of all, the manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from pipeline.ledger import Ledger, Marker, fingerprint, partial_path, publish, write_atomically
from pipeline.schema import (
    MANIFEST_FILE,
    NULL_TEXT_FILE,
    SELECTION_SCHEMA,
    BucketRecord,
    FileRecord,
    Manifest,
    SelectionRecord,
)
from pipeline.select import split_of
from pipeline.shards import describe_file, open_parquet
from streamdit.config import AutoencoderIdentity
from streamdit.errors import UserError

SELECTION_FOLDER = "selection"
Place = tuple[str, int, int]
"""File, row group, and row in the row group."""


def publish_dataset(
    dataset: Path,
    units: Sequence[str],
    selected: Mapping[str, pa.Table],
    config: IngestConfig,
    identity: AutoencoderIdentity,
    buckets: Sequence[BucketRecord],
) -> tuple[Manifest, int]:
    """Write the selection index and the manifest; returns it and the number of held-out clips.

    Args:
        dataset: dataset directory whose units are encoded.
        units: their names.
        selected: selected clips of each, with captions.
        config: ingestion configuration.
        identity: autoencoder of the latents.
        buckets: sizes of the clips.
    """
    files: list[FileRecord] = []
    rows: list[dict] = []
    for unit in units:
        markers = [_marker(dataset, s, unit) for s in ("curate", "annotate", "latents", "text")]
        files.extend(record for marker in markers for record in marker.files)
        latents, texts = (_places(dataset, marker) for marker in markers[2:])
        for row in selected[unit].to_pylist():
            if row["clip_id"] in latents:
                rows.append(_index_row(row, config, latents, texts))
    if not rows:
        raise UserError(
            f"none of the selected clips of {dataset} could be decoded: see the tables below "
            f"{dataset / 'dead' / 'latents'}"
        )
    files.extend(_marker(dataset, "text", "null").files)
    assert any(record.path == NULL_TEXT_FILE for record in files)
    rows.sort(key=lambda row: (row["bucket"], row["clip_id"]))
    selection, record = write_selection(dataset, rows, config.selection.expression)
    files.append(record)
    files.sort(key=lambda record: record.path)
    manifest = Manifest(
        fingerprint=fingerprint(
            config.clip,
            config.text_encoders,
            config.selection,
            identity,
            [[record.path, record.sha256] for record in files],
        ),
        autoencoder=identity,
        text_encoders=config.text_encoders,
        buckets=tuple(buckets),
        selection=selection,
        files=tuple(files),
    )
    write_atomically(dataset / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
    return manifest, sum(row["split"] == "held_out" for row in rows)


def write_selection(
    dataset: Path, rows: list[dict], expression: str
) -> tuple[SelectionRecord, FileRecord]:
    """Write the index of `rows` under the next version, or find that the last one is the same."""
    schema = SELECTION_SCHEMA.with_metadata({"expression": expression})
    version = max((_version_of(p) for p in _versions(dataset)), default=0) + 1
    path = _selection_path(version)
    target = dataset / path
    with open_parquet(target, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    before = dataset / _selection_path(version - 1)
    if before.exists() and before.read_bytes() == partial_path(target).read_bytes():
        os.unlink(partial_path(target))
        version, path = version - 1, _selection_path(version - 1)
    else:
        publish(partial_path(target), target)
    record = describe_file(dataset, path, "selection", len(rows))
    selection = SelectionRecord(version=version, path=path, expression=expression, rows=len(rows))
    return selection, record


def _index_row(
    row: dict, config: IngestConfig, latents: Mapping[str, Place], texts: Mapping[str, Place]
) -> dict:
    latent_file, latent_row_group, latent_row = latents[row["clip_id"]]
    text_file, text_row_group, text_row = texts[row["clip_id"]]
    return {
        "clip_id": row["clip_id"],
        "source_id": row["source_id"],
        "bucket": row["bucket"],
        "split": split_of(row["source_id"], config.selection.held_out_share),
        "caption": row["caption"],
        "latent_file": latent_file,
        "latent_row_group": latent_row_group,
        "latent_row": latent_row,
        "text_file": text_file,
        "text_row_group": text_row_group,
        "text_row": text_row,
    }


def _places(dataset: Path, marker: Marker) -> dict[str, Place]:
    """Where each clip of a unit's shards lies; no payload is read."""
    places: dict[str, Place] = {}
    for record in marker.files:
        with pq.ParquetFile(dataset / record.path) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["clip_id"])["clip_id"].to_pylist()
                places |= {clip_id: (record.path, group, row) for row, clip_id in enumerate(ids)}
    return places


def _marker(dataset: Path, stage: str, unit: str) -> Marker:
    marker = Ledger(dataset, stage).read(unit)
    assert marker is not None, f"{stage} left no marker for unit {unit}"
    return marker


def _versions(dataset: Path) -> list[Path]:
    return list((dataset / SELECTION_FOLDER).glob("selection-v*.parquet"))


def _version_of(path: Path) -> int:
    return int(path.stem.removeprefix("selection-v"))


def _selection_path(version: int) -> str:
    return f"{SELECTION_FOLDER}/selection-v{version:04d}.parquet"
