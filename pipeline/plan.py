"""Units of work: fixed groups of sources, so that a rerun finds the same pieces.

A unit never changes its members: sources found later form new units, and a source found at
another place keeps its unit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from pipeline.sources import Source
from pipeline.storage import DATA_PREFIX, is_s3, open_binary
from pipeline.store import DatasetPath, Store, open_store
from streamdit.errors import UserError

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Unit:
    """A content-derived group of sources."""

    name: str
    """Hash of its members' ids; 12 hexadecimal digits."""
    sources: tuple[Source, ...]
    """Members, sorted by id."""

    def to_json(self) -> str:
        """As text, to travel in a row."""
        return json.dumps({"name": self.name, "sources": [asdict(s) for s in self.sources]})

    @staticmethod
    def from_json(text: str) -> Unit:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        sources = (
            Source(**{**source, "sidecars": tuple(source["sidecars"])})
            for source in values["sources"]
        )
        return Unit(values["name"], tuple(sources))


def read_plan(dataset_dir: DatasetPath | Store) -> list[Unit]:
    """Units of a dataset directory; empty where nothing was curated yet."""
    return list(_each_unit(open_store(dataset_dir)))


def _each_unit(store: Store) -> Iterator[Unit]:
    """Units of the plan, line by line: there may be a million sources."""
    try:
        file = open_binary(store.uri(PLAN_FILE))
    except FileNotFoundError:
        return
    with file:
        for line in file:
            yield Unit.from_json(line.decode("utf-8"))


def write_plan(dataset_dir: DatasetPath | Store, units: Sequence[Unit]) -> None:
    """Replace the plan."""
    sink = open_store(dataset_dir).sink(PLAN_FILE)
    for unit in units:  # one by one: there may be a million sources
        sink.file.write((unit.to_json() + "\n").encode("utf-8"))
    sink.finish()


def require_plan(dataset_dir: DatasetPath | Store) -> list[Unit]:
    """Units of a dataset directory that must have been curated.

    Raises:
        UserError: if it was not.
    """
    store = open_store(dataset_dir)
    return read_plan(store) or _refuse(store)


def require_unit_names(dataset_dir: DatasetPath | Store) -> list[str]:
    """Names of the units alone, for what needs no list of a million sources.

    Raises:
        UserError: if the dataset was not curated.
    """
    store = open_store(dataset_dir)
    return [unit.name for unit in _each_unit(store)] or _refuse(store)


def _refuse(store: Store) -> NoReturn:
    raise UserError(
        f"dataset {store.root} holds no sources: run `streamdit ingest --only curate` on your "
        "videos first"
    )


def extend_plan(
    dataset_dir: DatasetPath | Store, sources: Sequence[Source], unit_sources: int
) -> list[Unit]:
    """Add the sources that are new to the plan and write it; returns all units."""
    units = read_plan(dataset_dir)
    found = {source.source_id: source for source in sources}
    units = [
        replace(unit, sources=tuple(_renew(s, found.pop(s.source_id, s)) for s in unit.sources))
        for unit in units
    ]
    new = [found[source_id] for source_id in sorted(found)]
    for first in range(0, len(new), unit_sources):
        members = tuple(new[first : first + unit_sources])
        units.append(Unit(_unit_name(members), members))
    write_plan(dataset_dir, units)
    return units


def _renew(known: Source, found: Source) -> Source:
    """`known` as it was found this time; a further copy of a file that still lies there is not."""
    if known.uri != found.uri and not is_s3(known.uri) and Path(known.uri).exists():
        return known
    return found


def _unit_name(members: Sequence[Source]) -> str:
    ids = ",".join(source.source_id for source in members)
    return hashlib.sha256(ids.encode()).hexdigest()[:12]


def sidecar_uris(unit: Unit) -> list[str]:
    """Caption files of a unit."""
    return [uri for source in unit.sources for uri in source.sidecars]


def sidecar_key(uri: str) -> str:
    """Name of a caption file among the inputs of a unit; captions given in a table are hashed."""
    if uri.startswith(DATA_PREFIX):
        return hashlib.sha256(uri.encode()).hexdigest()[:16]
    return uri
