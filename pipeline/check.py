"""Looking for damage: every file of a dataset against what its ledger and manifest say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.duplicate_table import ALL_UNITS
from pipeline.ledger import STAGE_KINDS, Ledger
from pipeline.plan import require_unit_names
from pipeline.schema import (
    ANNOTATION_SCHEMA,
    AUTOENCODER_FOLDER,
    CLIP_SCHEMA,
    DUPLICATE_SCHEMA,
    FOLDERS,
    ID_TYPE,
    LATENT_SCHEMA,
    MANIFEST_FILE,
    SELECTION_SCHEMA,
    SOURCE_SCHEMA,
    FileRecord,
    Manifest,
    id_array,
    load_manifest,
    text_schema,
)
from pipeline.stage_text import NULL_UNIT
from pipeline.store import DatasetPath, Store, open_store
from pipeline.threads import map_in_order
from streamdit.errors import UserError

READERS = 4

OnChecked = Callable[[int, int, dict[str, float]], None]
"""Called with files done, files in all, and how many problems there are."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    path: str
    """File, relative to the dataset directory."""
    message: str
    """What is wrong with it."""


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    files: int
    """Files looked at."""
    bytes: int
    """Their size."""
    complete: bool
    """Whether the dataset has a manifest, so that one can train on it."""
    problems: tuple[Problem, ...]
    """What is wrong, by path."""


def check_dataset(dataset_dir: DatasetPath, on_progress: OnChecked | None = None) -> CheckResult:
    """Compare every file with its record: is it there, its size, hash, rows and columns.

    A complete dataset is checked further: the manifest lists what the ledger does, and every row
    of the selection leads to the latent and the text of its clip.

    Raises:
        UserError: if this is no dataset, or its manifest cannot be read.
    """
    store = open_store(dataset_dir)
    records = {record.path: record for record in _listed(store)}
    manifest = load_manifest(store) if store.exists(MANIFEST_FILE) else None
    problems = [] if manifest is None else list(_check_lists(records, manifest))
    records |= {record.path: record for record in (manifest.files if manifest else ())}
    found = map_in_order(
        lambda record: _check_file(store, record, manifest), records.values(), READERS
    )
    for done, problem in enumerate(found, start=1):
        problems += [problem] if problem else []
        if on_progress:
            on_progress(done, len(records), {"problems": len(problems)})
    problems += _strays(store, records)
    if manifest:
        damaged = {problem.path for problem in problems}
        problems += _check_index(store, manifest, damaged)
        problems += _check_autoencoder(store, manifest)
    return CheckResult(
        files=len(records),
        bytes=sum(record.bytes for record in records.values()),
        complete=manifest is not None,
        problems=tuple(sorted(problems, key=lambda problem: problem.path)),
    )


def _listed(store: Store) -> Iterator[FileRecord]:
    """Files that markers list."""
    units = [*require_unit_names(store), NULL_UNIT, ALL_UNITS]
    for stage in STAGE_KINDS:
        for marker in map_in_order(Ledger(store, stage).read, units, READERS):
            yield from marker.files if marker else ()


def _check_lists(records: dict[str, FileRecord], manifest: Manifest) -> Iterator[Problem]:
    """Whether ledger and manifest speak of the same files."""
    listed = {record.path: record for record in manifest.files if record.kind != "selection"}
    for path in sorted({*records, *listed}):
        if path not in listed:
            yield Problem(path, "the manifest does not list it")
        elif path not in records:
            yield Problem(path, "no marker of the ledger lists it")
        elif listed[path].sha256 != records[path].sha256:
            yield Problem(path, "ledger and manifest tell different hashes")


def _check_file(store: Store, record: FileRecord, manifest: Manifest | None) -> Problem | None:
    """What is wrong with one file."""
    size = store.size(record.path)
    if size is None:
        return Problem(record.path, "it is missing")
    if size != record.bytes:
        return Problem(record.path, f"it has {size:,} bytes instead of {record.bytes:,}")
    if store.sha256(record.path) != record.sha256:
        return Problem(record.path, "its content has changed (SHA-256 differs)")
    try:
        with pq.ParquetFile(store.source(record.path)) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        return Problem(record.path, f"it is no Parquet file ({str(error).splitlines()[0]})")
    if rows != record.rows:
        return Problem(record.path, f"it has {rows:,} rows instead of {record.rows:,}")
    wanted = _schema_of(record, manifest)
    if wanted is not None and not schema.equals(wanted):
        odd = sorted(set(schema.names) ^ set(wanted.names))
        return Problem(record.path, f"its columns are not those of this version ({', '.join(odd)})")
    return None


def _schema_of(record: FileRecord, manifest: Manifest | None) -> pa.Schema | None:
    """Columns that a file must have; none where only a manifest could tell."""
    if record.kind in ("text", "text-null"):
        return text_schema(e.name for e in manifest.text_encoders) if manifest else None
    return {
        "source": SOURCE_SCHEMA,
        "clip": CLIP_SCHEMA,
        "duplicate": DUPLICATE_SCHEMA,
        "annotation": ANNOTATION_SCHEMA,
        "latent": LATENT_SCHEMA,
        "selection": SELECTION_SCHEMA,
    }.get(record.kind)


def _strays(store: Store, records: Iterable[str]) -> Iterator[Problem]:
    """Files between those of the dataset that nothing speaks of."""
    known = set(records)
    for kinds in STAGE_KINDS.values():
        for kind in kinds:
            for path in store.files(FOLDERS[kind]):
                if path not in known:
                    yield Problem(path, "nothing lists it; an interrupted run left it over")


def _check_index(store: Store, manifest: Manifest, damaged: set[str]) -> Iterator[Problem]:
    """Whether every row of the selection leads to its clip."""
    if manifest.selection.path in damaged:
        return
    for kind in ("latent", "text"):
        places = _read_places(store, manifest.selection.path, kind)
        shards = [shard for shard in places.shards() if shard[0] not in damaged]
        counts = map_in_order(partial(places.misplaced, store), shards, READERS)
        for (path, _), wrong in zip(shards, counts, strict=True):
            if wrong:
                message = f"{wrong:,} rows of {path} are not of the clip that the index names"
                yield Problem(manifest.selection.path, message)


@dataclass(frozen=True)
class _Places:
    """Where an index says that clips lie: arrays, for there may be millions."""

    paths: list[str]
    ids: np.ndarray
    """`S16 [n]`."""
    files: np.ndarray
    """`int32 [n]`: number of the path of each."""
    groups: np.ndarray
    """`int32 [n]`."""
    rows: np.ndarray
    """`int32 [n]`, within the row group."""

    def shards(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each file, with the rows of the index that lead into it."""
        order = np.argsort(self.files, kind="stable")
        ends = np.cumsum(np.bincount(self.files, minlength=len(self.paths)))
        return zip(self.paths, np.split(order, ends[:-1]), strict=True)

    def misplaced(self, store: Store, shard: tuple[str, np.ndarray]) -> int:
        """Rows of the index that lead into a file, but to another clip."""
        path, mine = shard
        found = np.zeros(len(mine), self.ids.dtype)
        with pq.ParquetFile(store.source(path)) as file:
            for group in range(file.num_row_groups):
                ids = id_array(file.read_row_group(group, columns=["clip_id"])["clip_id"])
                here = (self.groups[mine] == group) & (self.rows[mine] < len(ids))
                found[here] = ids[self.rows[mine[here]]]
        return int((found != self.ids[mine]).sum())


def _read_places(store: Store, path: str, kind: str) -> _Places:
    """The places of all clips of an index, which is read by and by."""
    columns = [f"{kind}_file", f"{kind}_row_group", f"{kind}_row"]
    numbers: dict[str, int] = {}
    first = 0
    with pq.ParquetFile(store.source(path), pre_buffer=False) as file:
        total = file.metadata.num_rows
        ids = np.empty(total, ID_TYPE)
        places = [np.empty(total, np.int32) for _ in columns]
        for batch in file.iter_batches(columns=["clip_id", *columns]):
            mine = slice(first, first + batch.num_rows)
            ids[mine] = id_array(batch["clip_id"])
            names = batch[columns[0]].to_pylist()
            places[0][mine] = [numbers.setdefault(name, len(numbers)) for name in names]
            places[1][mine] = batch[columns[1]].to_numpy()
            places[2][mine] = batch[columns[2]].to_numpy()
            first += batch.num_rows
    return _Places(list(numbers), ids, *places)


def _check_autoencoder(store: Store, manifest: Manifest) -> Iterator[Problem]:
    """Whether the copy of the autoencoder is the one that made the latents."""
    from streamdit.autoencoder import load_autoencoder

    if manifest.autoencoder.source != AUTOENCODER_FOLDER:
        return
    try:
        with store.local_folder(AUTOENCODER_FOLDER) as folder:
            found = load_autoencoder(folder).identity.sha256
    except UserError as error:
        yield Problem(AUTOENCODER_FOLDER, f"it cannot be loaded ({error})")
        return
    if found != manifest.autoencoder.sha256:
        yield Problem(AUTOENCODER_FOLDER, "it is not the autoencoder of these latents")
