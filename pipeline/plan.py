"""Units of work: fixed groups of sources, so that a rerun finds the same pieces.

A unit never changes its members: sources found later form new units, and a source found at
another place keeps its unit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.catalogue import Source, Sources
from pipeline.storage import DATA_PREFIX, is_s3, open_binary, read_span
from pipeline.store import DatasetPath, Store, open_store
from streamdit.errors import UserError

PLAN_FILE = "plan.json"
SECOND_LOOKS_S = (0.0, 1.0, 5.0, 15.0)
"""Waits before a unit is looked for: the nodes of a cluster may see another's new plan late."""


@dataclass(frozen=True)
class Unit:
    """A content-derived group of sources."""

    name: str
    """Hash of its members' ids; 12 hexadecimal digits."""
    sources: tuple[Source, ...]
    """Members, sorted by id."""

    def to_json(self) -> str:
        """As a line of the plan."""
        return json.dumps({"name": self.name, "sources": [asdict(s) for s in self.sources]})

    @staticmethod
    def from_json(text: str) -> Unit:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        return Unit(values["name"], tuple(Source.of(source) for source in values["sources"]))


@dataclass(frozen=True)
class UnitPlace:
    """Where a unit stands in the plan: what a driver keeps of it, and sends to a worker."""

    name: str
    """See :class:`Unit`."""
    start: int
    """Its first byte in the plan."""
    length: int
    """Bytes."""

    def read(self, store: Store) -> Unit:
        """The unit, wherever it stands by now.

        Raises:
            UserError: if it is no longer there.
        """
        for wait_s in SECOND_LOOKS_S:
            time.sleep(wait_s)
            unit = self._in_place(store) or next(
                (unit for unit in read_plan(store) if unit.name == self.name), None
            )
            if unit is not None:
                return unit
        raise UserError(
            f"{store.uri(PLAN_FILE)} no longer has unit {self.name}: another command changed the "
            "data set meanwhile; run this one again"
        )

    def _in_place(self, store: Store) -> Unit | None:
        try:
            line = read_span(store.uri(PLAN_FILE), self.start, self.length)
            unit = Unit.from_json(line.decode("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return unit if unit.name == self.name else None


def read_plan(dataset_dir: DatasetPath | Store) -> Iterator[Unit]:
    """Units of a dataset directory, one by one; none where nothing was curated yet."""
    for _, unit in read_places(dataset_dir):
        yield unit


def read_places(dataset_dir: DatasetPath | Store) -> Iterator[tuple[UnitPlace, Unit]]:
    """:func:`read_plan`, each with its place."""
    store = open_store(dataset_dir)
    try:
        file = open_binary(store.uri(PLAN_FILE))
    except FileNotFoundError:
        return
    with file:
        start = 0
        for line in file:
            unit = Unit.from_json(line.decode("utf-8"))
            yield UnitPlace(unit.name, start, len(line)), unit
            start += len(line)


def write_plan(dataset_dir: DatasetPath | Store, units: Iterable[Unit]) -> int:
    """Replace the plan, which `units` may be read from meanwhile; returns their number."""
    sink = open_store(dataset_dir).sink(PLAN_FILE)
    count = 0
    for unit in units:
        sink.file.write((unit.to_json() + "\n").encode("utf-8"))
        count += 1
    sink.finish()
    return count


def require_places(dataset_dir: DatasetPath | Store) -> list[UnitPlace]:
    """Places of the units of a dataset directory that must have been curated.

    Raises:
        UserError: if it was not.
    """
    store = open_store(dataset_dir)
    places = [place for place, _ in read_places(store)]
    if not places:
        raise UserError(
            f"dataset {store.root} holds no sources: run `streamdit ingest --only curate` on your "
            "videos first"
        )
    return places


def require_unit_names(dataset_dir: DatasetPath | Store) -> list[str]:
    """Names of the units of :func:`require_places`."""
    return [place.name for place in require_places(dataset_dir)]


def unit_tasks(
    places: Iterable[UnitPlace], done: Collection[str], settings: str, retry_dead: bool
) -> list[dict[str, Any]]:
    """A row for a stage for each unit that is not done; see :func:`unit_of`."""
    return [
        {"unit": asdict(place), "settings": settings, "retry_dead": retry_dead}
        for place in places
        if place.name not in done
    ]


def unit_of(store: Store, row: Mapping[str, Any]) -> Unit:
    """The unit that a row of :func:`unit_tasks` is about."""
    return UnitPlace(**row["unit"]).read(store)


def extend_plan(dataset_dir: DatasetPath | Store, sources: Sources, unit_sources: int) -> int:
    """Add sources to the plan; returns the number of units.

    Those that the plan knows already are taken out of `sources`. Memory holds a unit at a time:
    there may be a million sources.
    """
    return write_plan(dataset_dir, _extended(read_plan(dataset_dir), sources, unit_sources))


def _extended(units: Iterable[Unit], sources: Sources, unit_sources: int) -> Iterator[Unit]:
    for unit in units:
        yield replace(
            unit, sources=tuple(_renew(s, sources.take(s.source_id) or s) for s in unit.sources)
        )
    new = iter(sources)
    while members := tuple(itertools.islice(new, unit_sources)):
        yield Unit(_unit_name(members), members)


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
