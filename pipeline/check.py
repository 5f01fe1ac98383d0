"""Looking for damage: every file of a dataset against what its ledger and manifest say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.duplicate_table import ALL_UNITS
from pipeline.ledger import STAGE_KINDS, Ledger, Marker
from pipeline.plan import require_plan
from pipeline.schema import (
    ANNOTATION_SCHEMA,
    AUTOENCODER_FOLDER,
    CLIP_SCHEMA,
    DUPLICATE_SCHEMA,
    FOLDERS,
    LATENT_SCHEMA,
    MANIFEST_FILE,
    SELECTION_SCHEMA,
    SOURCE_SCHEMA,
    FileRecord,
    Manifest,
    load_manifest,
    text_schema,
)
from pipeline.stage_text import NULL_UNIT
from pipeline.store import DatasetPath, Store, open_store
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
    markers = list(_markers(store))
    manifest = load_manifest(store) if store.exists(MANIFEST_FILE) else None
    records = {record.path: record for marker in markers for record in marker.files}
    problems = [] if manifest is None else list(_check_lists(records, manifest))
    records |= {record.path: record for record in (manifest.files if manifest else ())}
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda record: _check_file(store, record, manifest), records.values())
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


def _markers(store: Store) -> Iterator[Marker]:
    units = [unit.name for unit in require_plan(store)]
    for stage in STAGE_KINDS:
        yield from Ledger(store, stage).read_all([*units, NULL_UNIT, ALL_UNITS]).values()


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
    index = pq.read_table(store.source(manifest.selection.path)).to_pylist()
    for kind in ("latent", "text"):
        by_file: dict[str, list[dict]] = {}
        for row in index:
            by_file.setdefault(row[f"{kind}_file"], []).append(row)
        for path, rows in by_file.items():
            if path not in damaged and (wrong := _misplaced(store, kind, path, rows)):
                message = f"{wrong:,} rows of {path} are not of the clip that the index names"
                yield Problem(manifest.selection.path, message)


def _misplaced(store: Store, kind: str, path: str, rows: list[dict]) -> int:
    with pq.ParquetFile(store.source(path)) as file:
        ids = [
            file.read_row_group(group, columns=["clip_id"])["clip_id"].to_pylist()
            for group in range(file.num_row_groups)
        ]
    places = {(g, r): clip_id for g, group in enumerate(ids) for r, clip_id in enumerate(group)}
    return sum(
        places.get((row[f"{kind}_row_group"], row[f"{kind}_row"])) != row["clip_id"] for row in rows
    )


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
