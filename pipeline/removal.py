"""Taking a source out of a dataset, with every trace of it.

What is to be removed is written down first and that note deleted last, so a removal that was
interrupted is finished by the next command on the dataset, whichever it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.counters import (
    Counters,
    annotate_counters,
    curate_counters,
    latent_counters,
    text_counters,
)
from pipeline.dead_letters import read_unit_dead_letters
from pipeline.duplicate_table import duplicates_records, require_duplicates
from pipeline.index import SELECTION_FOLDER, content_fingerprint, relocate, write_manifest
from pipeline.ledger import CLIPS_INPUT, STAGE_KINDS, Ledger, Marker
from pipeline.pending import TEXT, TextWork
from pipeline.plan import Unit, read_plan, sidecar_key, write_plan
from pipeline.removed import forbid
from pipeline.schema import (
    FOLDERS,
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    load_manifest,
    read_dead_letters,
)
from pipeline.shards import open_parquet, read_rows
from pipeline.store import DatasetPath, Store, open_store, walk_parquet
from streamdit.config import StrictModel
from streamdit.errors import UserError

NOTE_FILE = "removing.json"
DELETED_WHEN_EMPTY = {FOLDERS["latent"], FOLDERS["text"], FOLDERS["dead"]}
IDENTIFYING = ("source_id", "clip_id", "uri")
"""Columns that tell which rows belong to a source."""


class RemovalNote(StrictModel):
    """`removing.json`: what an unfinished removal is about."""

    source_ids: tuple[str, ...]
    """Sources to remove."""
    uris: tuple[str, ...]
    """Where they lie."""
    units: tuple[str, ...]
    """Units that they are in; the plan may have lost them already."""
    clip_ids: tuple[str, ...]
    """Their clips."""
    manifest: Manifest | None
    """The dataset's manifest before, if it was complete."""


@dataclass(frozen=True)
class RemovalSummary:
    """What was removed."""

    uris: tuple[str, ...]
    """Videos, by their addresses."""
    clips: int
    """Clips of theirs."""


def remove_source(dataset_dir: DatasetPath, name: str) -> RemovalSummary:
    """Take a source out: its rows, captions, scores, latents, dead letters and marks in the ledger.

    The id of the source, which is a hash, is kept so that it does not come back.

    Args:
        dataset_dir: dataset directory or `s3://` prefix.
        name: id of the source, its address, or its file name.

    Raises:
        UserError: if there is no such source, or several.
    """
    store = open_store(dataset_dir)
    finish_removal(store)
    source_ids, uris = _find(store, name)
    units = [u.name for u in read_plan(store) if {s.source_id for s in u.sources} & {*source_ids}]
    note = RemovalNote(
        source_ids=source_ids,
        uris=uris,
        units=tuple(units),
        clip_ids=tuple(_clips_of(store, units, source_ids)),
        manifest=load_manifest(store) if store.exists(MANIFEST_FILE) else None,
    )
    store.write_text(NOTE_FILE, note.model_dump_json(indent=1) + "\n")
    finish_removal(store)
    return RemovalSummary(uris, len(note.clip_ids))


def finish_removal(store: Store) -> None:
    """Do what `removing.json` says, if it is there; every step may be repeated."""
    try:
        note = RemovalNote.model_validate_json(store.read_text(NOTE_FILE))
    except FileNotFoundError:
        return
    except ValidationError:
        raise UserError(
            f"{store.uri(NOTE_FILE)} is damaged, so a removal cannot be finished: delete it and "
            "run `streamdit dataset remove` again"
        ) from None
    store.delete(MANIFEST_FILE)
    forbid(store, note.source_ids)
    others = {unit.name for unit in read_plan(store)} - set(note.units)
    _rewrite_tables(store, note, others)
    for unit in read_plan(store):
        if unit.name in note.units:
            _rewrite_markers(store, _without(unit, note))
    left = [unit.name for unit in read_plan(store) if _without(unit, note).sources]
    # Of a curation that was interrupted, the rest is compared when it is finished.
    require_duplicates(store, [unit for unit, _ in Ledger(store, "curate").each(left)])
    if note.manifest:
        _republish(store, note.manifest, note.units)
    kept = (_without(unit, note) for unit in read_plan(store))
    write_plan(store, (unit for unit in kept if unit.sources))
    store.delete(NOTE_FILE)


def _find(store: Store, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids and addresses of the source that `name` means."""
    exact: dict[str, set[str]] = {}
    called: dict[str, set[str]] = {}
    for uri, source_id in _addresses(store):
        if name in (uri, source_id):
            exact.setdefault(uri, set()).add(source_id)
        elif uri.rsplit("/", 1)[-1] == name:
            called.setdefault(uri, set()).add(source_id)
    # A video that was replaced in its place is two sources at one address.
    found = exact or called
    if not found:
        count = sum(len(unit.sources) for unit in read_plan(store))
        raise UserError(
            f"dataset {store.root} has no source {name}: give the id, the address or the file name "
            f"of one of its {count:,} sources"
        )
    if len({tuple(sorted(ids - {""})) or uri for uri, ids in found.items()}) > 1:
        raise UserError(
            f"{len(found)} sources of {store.root} are called {name}: give the address of one, "
            f"such as {next(iter(found))}"
        )
    return tuple(sorted(set().union(*found.values()) - {""})), tuple(found)


def _addresses(store: Store) -> Iterator[tuple[str, str]]:
    """Address and id of every source, then of what could not be read, whose id may be empty."""
    for unit in read_plan(store):
        for source in unit.sources:
            yield source.uri, source.source_id
    for row in read_dead_letters(store).to_pylist():
        yield row["uri"], row["source_id"] or ""


def _clips_of(store: Store, units: Sequence[str], source_ids: Sequence[str]) -> list[str]:
    markers = Ledger(store, "curate").each(units)
    rows = (row for _, marker in markers for row in read_rows(store, marker, "clip"))
    return sorted(row["clip_id"] for row in rows if row["source_id"] in source_ids)


def _without(unit: Unit, note: RemovalNote) -> Unit:
    sources = tuple(s for s in unit.sources if s.source_id not in note.source_ids)
    return replace(unit, sources=sources)


def _rewrite_tables(store: Store, note: RemovalNote, others: set[str]) -> None:
    """Drop the rows of the sources from every table but those of the units `others`."""
    for path in list(walk_parquet(store, "")):
        if others.isdisjoint(path.rsplit("/", 1)[-1].removesuffix(".parquet").split("-")):
            _rewrite_table(store, path, note)


def _rewrite_table(store: Store, path: str, note: RemovalNote) -> None:
    """Drop rows of one table; a shard or table of dead letters that has none left is deleted."""
    with pq.ParquetFile(store.source(path), pre_buffer=False) as file:
        columns = [name for name in IDENTIFYING if name in file.schema_arrow.names]
        if not columns:
            return
        groups = range(file.num_row_groups)
        masks = [_keeps(file.read_row_group(group, columns=columns), note) for group in groups]
        rows = sum(pc.sum(mask).as_py() or 0 for mask in masks)
        if rows == file.metadata.num_rows:
            return
        if not rows and path.split("/", 1)[0] in DELETED_WHEN_EMPTY:
            store.delete(path)
            return
        compression = file.metadata.row_group(0).column(0).compression.lower()
        compression = "none" if compression == "uncompressed" else compression
        sink = store.sink(path)
        with open_parquet(sink.file, file.schema_arrow, compression) as writer:
            for group, mask in zip(groups, masks, strict=True):
                table = file.read_row_group(group).filter(mask)
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
    sink.finish()


def _keeps(ids: pa.Table, note: RemovalNote) -> pa.ChunkedArray:
    """Which rows belong to none of the sources."""
    gone = pa.chunked_array([pa.array([False] * ids.num_rows, pa.bool_())])
    for name, values in zip(IDENTIFYING, (note.source_ids, note.clip_ids, note.uris), strict=True):
        if name in ids.column_names:
            found = pc.is_in(ids[name], value_set=pa.array(values, pa.string()))
            gone = pc.or_(gone, found)
    return pc.invert(gone)


def _rewrite_markers(store: Store, unit: Unit) -> None:
    """Bring the markers of a unit up to what its tables hold now."""
    for stage in STAGE_KINDS:
        ledger = Ledger(store, stage)
        marker = ledger.read(unit.name)
        if marker is None:
            continue
        if not unit.sources:
            for record in marker.files:
                store.delete(record.path)
            store.delete(ledger.path(unit.name))
            continue
        changed = marker.model_copy(update={"files": _current(store, marker.files)})
        inputs = _inputs(store, changed, stage, unit)
        counters = _counters(store, changed, stage)
        ledger.write(changed.model_copy(update={"inputs": inputs, "counters": counters}))


def _current(store: Store, records: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    """Records of the files that are still there, as they are now."""
    found = []
    for record in records:
        size = store.size(record.path)
        if size is not None:
            with pq.ParquetFile(store.source(record.path)) as file:
                rows = file.metadata.num_rows
            update = {"rows": rows, "bytes": size, "sha256": store.sha256(record.path)}
            found.append(record.model_copy(update=update))
    return tuple(found)


def _inputs(store: Store, marker: Marker, stage: str, unit: Unit) -> dict[str, str]:
    """What the unit depends on, without the sources."""
    if stage == "curate":
        ids = {source.source_id for source in unit.sources}
        return {name: version for name, version in marker.inputs.items() if name in ids}
    if stage == "annotate":
        curated = Ledger(store, "curate").read(unit.name)
        files = curated.files if curated else ()
        clips = ",".join(record.sha256 for record in files if record.kind == "clip")
        beside = {sidecar_key(uri) for source in unit.sources for uri in source.sidecars}
        kept = {name: version for name, version in marker.inputs.items() if name in beside}
        return {CLIPS_INPUT: clips, **kept}
    if stage == TEXT:
        return TextWork.find(store, unit.name).wanted(marker.settings).inputs
    return marker.inputs


def _counters(store: Store, marker: Marker, stage: str) -> Counters:
    dead = read_unit_dead_letters(store, stage, marker.unit)
    if stage == "curate":
        sources = read_rows(store, marker, "source")
        return curate_counters(sources, len(read_rows(store, marker, "clip")), dead)
    if stage == "annotate":
        return annotate_counters(read_rows(store, marker, "annotation"), dead)
    if stage == TEXT:
        return text_counters(marker.files)
    return latent_counters(marker.files, dead)


def _republish(store: Store, before: Manifest, touched: Sequence[str]) -> None:
    """Write the next version of the selection, and the manifest over what is left."""
    names = tuple(f"-{unit}-" for unit in touched)
    changed = [r for r in before.files if any(name in r.path for name in names)]
    rewritten = ("selection", "duplicate")
    same = [r for r in before.files if r not in changed and r.kind not in rewritten]
    current = _current(store, changed)
    selection, record = relocate(store, before.selection, current)
    for path in walk_parquet(store, SELECTION_FOLDER):
        if path != record.path:
            store.delete(path)  # earlier versions point into shards that have changed
    files = sorted([*same, *current, *duplicates_records(store), record], key=lambda r: r.path)
    fingerprint = content_fingerprint(before.autoencoder, before.text_encoders, files)
    update = {"selection": selection, "files": tuple(files), "fingerprint": fingerprint}
    write_manifest(store, before.model_copy(update=update))
