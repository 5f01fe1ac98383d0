"""Publishing a dataset: the selection index and, last of all, the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import IngestConfig
from pipeline.duplicate_table import duplicates_records
from pipeline.ledger import READERS, Marker, fingerprint, require_markers
from pipeline.pending import LATENTS, TEXT
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
from pipeline.shards import open_parquet
from pipeline.sorting import in_groups, sorted_rows
from pipeline.store import Sink, Store, walk_parquet
from pipeline.threads import map_in_order
from streamdit.config import AutoencoderIdentity, TextEncoderConfig
from streamdit.errors import UserError

SELECTION_FOLDER = "selection"
UNIT_STAGES = ("curate", "annotate", LATENTS, TEXT)
ROW_GROUP = 1 << 16
"""Rows of a row group of the index, and those held in memory at once."""

Counts = Counter[tuple[str, str]]
"""Clips of each bucket and split."""


@dataclass(frozen=True)
class Publication:
    """A dataset that was published."""

    manifest: Manifest
    clips: Counts

    @property
    def held_out(self) -> int:
        """Clips kept from training."""
        return sum(count for (_, split), count in self.clips.items() if split == "held_out")

    @property
    def video_s(self) -> float:
        """Seconds that the selected clips cover."""
        seconds = {bucket.name: bucket.frames / bucket.fps for bucket in self.manifest.buckets}
        return sum(count * seconds[bucket] for (bucket, _), count in self.clips.items())


def publish_dataset(
    store: Store,
    units: Sequence[str],
    select: Callable[[str], pa.Table],
    config: IngestConfig,
    identity: AutoencoderIdentity,
    buckets: Sequence[BucketRecord],
) -> Publication:
    """Write the selection index and, last, the manifest.

    Args:
        store: dataset whose units are encoded.
        units: their names.
        select: selected clips of a unit, with captions.
        config: ingestion configuration.
        identity: autoencoder of the latents.
        buckets: sizes of the clips.

    Raises:
        UserError: if a unit is not finished, or no selected clip has a latent.
    """
    files: list[FileRecord] = []

    def index_unit(unit: str) -> tuple[pa.Table, list[FileRecord]]:
        markers = {stage: require_markers(store, stage, [unit])[unit] for stage in UNIT_STAGES}
        table = _index_unit(store, select(unit), markers[LATENTS], markers[TEXT], config)
        return table, [record for marker in markers.values() for record in marker.files]

    def tables() -> Iterator[pa.Table]:
        for table, records in map_in_order(index_unit, units, READERS):
            files.extend(records)
            yield table

    rows = sorted_rows(tables(), ROW_GROUP)
    selection, record, clips = _write_selection(store, rows, config.selection.expression)
    files.extend(require_markers(store, TEXT, ["null"])["null"].files)
    assert any(file.path == NULL_TEXT_FILE for file in files)
    files.append(record)
    files.extend(duplicates_records(store))
    files.sort(key=lambda file: file.path)
    manifest = Manifest(
        fingerprint=content_fingerprint(identity, config.text_encoders, files),
        autoencoder=identity,
        text_encoders=config.text_encoders,
        buckets=tuple(buckets),
        selection=selection,
        files=tuple(files),
    )
    write_manifest(store, manifest)
    return Publication(manifest, clips)


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


def relocate(
    store: Store, selection: SelectionRecord, shards: Iterable[FileRecord]
) -> tuple[SelectionRecord, FileRecord]:
    """Write the next version of an index, with the places that clips have in changed shards."""
    version = selection.version + 1
    before = selection.path if store.exists(selection.path) else selection_path(version)
    changed = list(shards)
    places = [_places(store, changed, kind) for kind in ("latent", "text")]
    moved = (_moved(rows, places) for rows in _read_rows(store, before))
    sink, clips = _write_rows(store, version, moved, selection.expression)
    size, digest = sink.finish()
    return _records(version, selection.expression, clips.total(), size, digest)


def _write_selection(
    store: Store, rows: Iterable[pa.Table], expression: str
) -> tuple[SelectionRecord, FileRecord, Counts]:
    """Write the index under the next version, unless the last one is the same."""
    latest = max(map(_version_of, walk_parquet(store, SELECTION_FOLDER)), default=0)
    sink, clips = _write_rows(store, latest + 1, rows, expression)
    if not clips:
        sink.discard()
        raise UserError(
            f"none of the selected clips of {store.root} has latents: run `streamdit ingest --only "
            f"encode` with this selection, or see {store.uri('dead/latents')} if they all failed"
        )
    size, digest = sink.digest()
    if latest and _is_there(store, selection_path(latest), size, digest):
        sink.discard()
    else:
        latest += 1
        sink.finish()
    return *_records(latest, expression, clips.total(), size, digest), clips


def _write_rows(
    store: Store, version: int, rows: Iterable[pa.Table], expression: str
) -> tuple[Sink, Counts]:
    """Write an index, equal to the byte for equal rows; it has no name yet."""
    schema = SELECTION_SCHEMA.with_metadata({"expression": expression})
    clips: Counts = Counter()
    sink = store.sink(selection_path(version))
    try:
        with open_parquet(sink.file, schema) as writer:
            for group in in_groups(rows, ROW_GROUP):
                writer.write_table(group.cast(schema), row_group_size=ROW_GROUP)
                counts = group.group_by(["bucket", "split"]).aggregate([([], "count_all")])
                columns = [counts[name].to_pylist() for name in ("bucket", "split", "count_all")]
                for bucket, split, count in zip(*columns, strict=True):
                    clips[bucket, split] += count
    except BaseException:
        sink.discard()
        raise
    return sink, clips


def _records(
    version: int, expression: str, rows: int, size: int, digest: str
) -> tuple[SelectionRecord, FileRecord]:
    path = selection_path(version)
    return (
        SelectionRecord(version=version, path=path, expression=expression, rows=rows),
        FileRecord(path=path, kind="selection", rows=rows, bytes=size, sha256=digest),
    )


def _is_there(store: Store, path: str, size: int, digest: str) -> bool:
    return store.size(path) == size and store.sha256(path) == digest


def _read_rows(store: Store, path: str) -> Iterator[pa.Table]:
    """Rows of an index, a row group at a time."""
    with pq.ParquetFile(store.source(path), pre_buffer=False) as file:
        for batch in file.iter_batches(ROW_GROUP):
            yield pa.Table.from_batches([batch])


def _moved(rows: pa.Table, places: Iterable[pa.Table]) -> pa.Table:
    """Rows of an index, with other places for the clips that have one."""
    for table in places:
        found = table.take(pc.index_in(rows["clip_id"], value_set=table["clip_id"]))
        for name in table.column_names[1:]:
            at = rows.column_names.index(name)
            rows = rows.set_column(at, name, pc.coalesce(found[name], rows[name]))
    return rows


def _index_unit(
    store: Store, selected: pa.Table, latents: Marker, texts: Marker, config: IngestConfig
) -> pa.Table:
    """Index rows of the selected clips of a unit that have a latent."""
    table = selected.select(["clip_id", "source_id", "bucket", "caption"])
    for marker, kind in ((latents, "latent"), (texts, "text")):
        places = _places(store, marker.files, kind)
        found = places.take(pc.index_in(table["clip_id"], value_set=places["clip_id"]))
        for name in places.column_names[1:]:
            table = table.append_column(name, found[name])
    table = table.filter(pc.is_valid(table["latent_file"]))
    assert not table["text_file"].null_count, "latents and text do not hold the same clips"
    sources = pc.unique(table["source_id"])
    splits = [split_of(name, config.selection.held_out_share) for name in sources.to_pylist()]
    split = pa.array(splits, pa.string()).take(pc.index_in(table["source_id"], value_set=sources))
    return table.append_column("split", split).select(SELECTION_SCHEMA.names)


def _places(store: Store, files: Iterable[FileRecord], kind: str) -> pa.Table:
    """Where each clip of the shards of a kind lies; no payload is read."""
    names = ("clip_id", f"{kind}_file", f"{kind}_row_group", f"{kind}_row")
    schema = pa.schema([SELECTION_SCHEMA.field(name) for name in names])
    tables = [schema.empty_table()]
    for record in files:
        if record.kind != kind:
            continue
        with pq.ParquetFile(store.source(record.path)) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["clip_id"])["clip_id"]
                rows = np.arange(len(ids), dtype=np.int32)
                columns = [ids, pa.repeat(record.path, len(ids)), np.full_like(rows, group), rows]
                tables.append(pa.table(columns, schema=schema))
    return pa.concat_tables(tables).combine_chunks()


def _version_of(path: str) -> int:
    return int(path.rsplit("selection-v", 1)[-1].removesuffix(".parquet"))


def selection_path(version: int) -> str:
    """Where a version of the index lies, relative to the dataset directory."""
    return f"{SELECTION_FOLDER}/selection-v{version:04d}.parquet"
