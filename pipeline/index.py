"""Publishing a dataset: the selection index and, last of all, the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from pipeline.duplicate_table import duplicates_records
from pipeline.graph import Row
from pipeline.ledger import READERS, Marker, fingerprint, require_markers
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
from pipeline.shards import write_table
from pipeline.store import Store, walk_parquet
from streamdit.config import AutoencoderIdentity, TextEncoderConfig
from streamdit.errors import UserError

SELECTION_FOLDER = "selection"
Place = tuple[str, int, int]
"""File, row group, and row in the row group."""


def publish_dataset(
    store: Store,
    units: Sequence[str],
    selected: Mapping[str, pa.Table],
    config: IngestConfig,
    identity: AutoencoderIdentity,
    buckets: Sequence[BucketRecord],
) -> tuple[Manifest, int]:
    """Write the selection index and the manifest; returns it and the number of held-out clips.

    Args:
        store: dataset whose units are encoded.
        units: their names.
        selected: selected clips of each, with captions.
        config: ingestion configuration.
        identity: autoencoder of the latents.
        buckets: sizes of the clips.
    """
    stages = ("curate", "annotate", "latents", "text")
    markers = {stage: require_markers(store, stage, units) for stage in stages}
    files = [record for stage in stages for unit in units for record in markers[stage][unit].files]
    with ThreadPoolExecutor(READERS) as pool:
        tables = pool.map(
            lambda unit: _index_unit(
                store, selected[unit], markers["latents"][unit], markers["text"][unit], config
            ),
            units,
        )
        index = pa.concat_tables(tables).sort_by([(n, "ascending") for n in ("bucket", "clip_id")])
    if not index.num_rows:
        raise UserError(
            f"none of the selected clips of {store.root} has latents: run `streamdit ingest --only "
            f"encode` with this selection, or see {store.uri('dead/latents')} if they all failed"
        )
    files.extend(require_markers(store, "text", ["null"])["null"].files)
    assert any(record.path == NULL_TEXT_FILE for record in files)
    selection, record = write_selection(store, index, config.selection.expression)
    files.append(record)
    files.extend(duplicates_records(store))
    files.sort(key=lambda record: record.path)
    manifest = Manifest(
        fingerprint=content_fingerprint(identity, config.text_encoders, files),
        autoencoder=identity,
        text_encoders=config.text_encoders,
        buckets=tuple(buckets),
        selection=selection,
        files=tuple(files),
    )
    write_manifest(store, manifest)
    return manifest, index["split"].to_pylist().count("held_out")


def content_fingerprint(
    identity: AutoencoderIdentity,
    encoders: Sequence[TextEncoderConfig],
    files: Sequence[FileRecord],
) -> str:
    """Hash of the encoders and of the content of every file."""
    return fingerprint(identity, list(encoders), [[record.path, record.sha256] for record in files])


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Write `manifest.json`, which makes the dataset complete."""
    store.write_text(MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")


def write_selection(
    store: Store, index: pa.Table, expression: str
) -> tuple[SelectionRecord, FileRecord]:
    """Write the index under the next version, or find that the last one is the same."""
    versions = [_version_of(path) for path in walk_parquet(store, SELECTION_FOLDER)]
    latest = max(versions, default=0)
    if latest and _has_content(store, selection_path(latest), index, expression):
        path = selection_path(latest)
        digest = store.sha256(path)
        size = store.size(path) or 0
        record = FileRecord(
            path=path, kind="selection", rows=index.num_rows, bytes=size, sha256=digest
        )
    else:
        latest += 1
        path = selection_path(latest)
        named = index.replace_schema_metadata({"expression": expression})
        record = write_table(store, path, "selection", named, named.schema)
    selection = SelectionRecord(
        version=latest, path=path, expression=expression, rows=index.num_rows
    )
    return selection, record


def relocate(
    store: Store, selection: SelectionRecord, shards: Iterable[FileRecord]
) -> tuple[SelectionRecord, FileRecord]:
    """Write the next version of an index, with the places that clips have in changed shards."""
    version = selection.version + 1
    before = selection.path if store.exists(selection.path) else selection_path(version)
    rows = pq.read_table(store.source(before)).to_pylist()
    places = {
        kind: _places(store, [record for record in shards if record.kind == kind])
        for kind in ("latent", "text")
    }
    for row in rows:
        for kind, found in places.items():
            if place := found.get(row["clip_id"]):
                names = (f"{kind}_file", f"{kind}_row_group", f"{kind}_row")
                row.update(zip(names, place, strict=True))
    index = pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA)
    named = index.replace_schema_metadata({"expression": selection.expression})
    record = write_table(store, selection_path(version), "selection", named, named.schema)
    update = {"version": version, "path": record.path, "rows": record.rows}
    return selection.model_copy(update=update), record


def _has_content(store: Store, path: str, index: pa.Table, expression: str) -> bool:
    """Whether an index that is there holds the same rows for the same expression."""
    table = pq.read_table(store.source(path))
    metadata = table.schema.metadata or {}
    return metadata.get(b"expression") == expression.encode() and table.equals(index)


def _index_unit(
    store: Store, selected: pa.Table, latents: Marker, texts: Marker, config: IngestConfig
) -> pa.Table:
    """Index rows of the selected clips of a unit that have a latent."""
    latent_places, text_places = _places(store, latents.files), _places(store, texts.files)
    rows = [
        _index_row(row, config, latent_places[row["clip_id"]], text_places[row["clip_id"]])
        for row in selected.select(["clip_id", "source_id", "bucket", "caption"]).to_pylist()
        if row["clip_id"] in latent_places
    ]
    return pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA)


def _index_row(row: Row, config: IngestConfig, latent: Place, text: Place) -> Row:
    return {
        **row,
        "split": split_of(row["source_id"], config.selection.held_out_share),
        "latent_file": latent[0],
        "latent_row_group": latent[1],
        "latent_row": latent[2],
        "text_file": text[0],
        "text_row_group": text[1],
        "text_row": text[2],
    }


def _places(store: Store, files: Iterable[FileRecord]) -> dict[str, Place]:
    """Where each clip of shards lies; no payload is read."""
    places: dict[str, Place] = {}
    for record in files:
        with pq.ParquetFile(store.source(record.path)) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["clip_id"])["clip_id"].to_pylist()
                places |= {clip_id: (record.path, group, row) for row, clip_id in enumerate(ids)}
    return places


def _version_of(path: str) -> int:
    return int(path.rsplit("selection-v", 1)[-1].removesuffix(".parquet"))


def selection_path(version: int) -> str:
    """Where a version of the index lies, relative to the dataset directory."""
    return f"{SELECTION_FOLDER}/selection-v{version:04d}.parquet"
