"""What is done: one marker per stage and unit, written last.

A rerun skips a unit whose marker names the settings and inputs that it would have now, and does
every other one again under the same file names, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from pipeline.schema import FOLDERS, FileRecord
from pipeline.store import DatasetPath, Store, open_store
from pipeline.threads import map_in_order
from streamdit.config import StrictModel
from streamdit.errors import UserError

T = TypeVar("T")

LEDGER_FOLDER = "ledger"
MAX_ATTEMPTS = 3
CLIPS_INPUT = "clips"
"""Name of the clip table among the inputs of annotations."""
READERS = 16
"""Markers read at once; on S3 each is a request."""

STAGE_KINDS: dict[str, tuple[str, ...]] = {
    "curate": ("source", "clip"),
    "duplicates": ("duplicate",),
    "annotate": ("annotation",),
    "latents": ("latent",),
    "text": ("text",),
}
"""Kinds of files that each stage writes for a unit."""


class Wanted(StrictModel):
    """What the files of a unit depend on."""

    settings: str
    """Hash of the settings and of the code's revision."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Name of each input to its version."""


class Marker(StrictModel):
    """A finished unit of a stage."""

    unit: str
    """Name of the unit."""
    settings: str
    """See :class:`Wanted`."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """See :class:`Wanted`."""
    files: tuple[FileRecord, ...] = ()
    """What was written."""
    counters: dict[str, float] = Field(default_factory=dict)
    """Totals for summaries."""
    attempts: int = 1
    """Runs so far that ended with these settings and inputs."""

    def fits(self, wanted: Wanted) -> bool:
        """Whether the unit was made from these settings and inputs."""
        return self.settings == wanted.settings and self.inputs == wanted.inputs

    def is_to_be_retried(self, retry_dead: bool = False) -> bool:
        """Whether inputs that failed get another run."""
        if retry_dead:
            return bool(self.counters.get("dead"))
        return bool(self.counters.get("retryable")) and self.attempts < MAX_ATTEMPTS


def fingerprint(*parts: Any) -> str:
    """Hash of JSON-like values and pydantic models; 16 hexadecimal digits."""
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(part: Any) -> Any:
    if isinstance(part, BaseModel):
        return part.model_dump(mode="json")
    if isinstance(part, (list, tuple)):
        return [_plain(item) for item in part]
    return part


class Ledger:
    """Markers of one stage of a dataset."""

    def __init__(self, dataset_dir: DatasetPath | Store, stage: str) -> None:
        self.store = open_store(dataset_dir)
        self.stage = stage

    def path(self, unit: str) -> str:
        """Where the marker of `unit` lies."""
        return f"{LEDGER_FOLDER}/{self.stage}/{unit}.json"

    def read(self, unit: str) -> Marker | None:
        """The marker of `unit`; none where there is none, or one of another version."""
        try:
            return Marker.model_validate_json(self.store.read_text(self.path(unit)))
        except (FileNotFoundError, ValidationError):
            return None

    def each(self, units: Iterable[str]) -> Iterator[tuple[str, Marker]]:
        """`units` that have a marker, each with it, in order; none is kept."""

        def look(unit: str) -> tuple[str, Marker | None]:
            return unit, self.read(unit)

        for unit, marker in map_in_order(look, units, READERS):
            if marker is not None:
                yield unit, marker

    def read_matching(self, unit: str, wanted: Wanted) -> Marker | None:
        """The marker of `unit` if it is the wanted one and its files are still there."""
        marker = self.read(unit)
        if marker is None or not marker.fits(wanted):
            return None
        intact = (self.store.size(record.path) == record.bytes for record in marker.files)
        return marker if all(intact) else None

    def read_done(
        self, wanted: Iterable[tuple[str, Wanted]], retry_dead: bool = False
    ) -> dict[str, dict[str, float]]:
        """Counters of the units that need no work.

        Inputs that failed for a passing reason get :data:`MAX_ATTEMPTS` runs in all; with
        `retry_dead` whatever failed gets another one.

        Args:
            wanted: units, each with what its files depend on; they are taken as they are needed.
            retry_dead: see above.
        """
        sizes: dict[str, int] = {}
        for kind in STAGE_KINDS[self.stage]:
            sizes |= self.store.files(FOLDERS[kind])

        def look(item: tuple[str, Wanted]) -> tuple[str, dict[str, float] | None]:
            unit, needed = item
            marker = self.read(unit)
            if marker is None or not marker.fits(needed):
                return unit, None
            intact = all(sizes.get(record.path) == record.bytes for record in marker.files)
            again = not intact or marker.is_to_be_retried(retry_dead)
            return unit, None if again else marker.counters

        found = map_in_order(look, wanted, READERS)
        return {unit: counters for unit, counters in found if counters is not None}

    def begin(self, unit: str, wanted: Wanted) -> None:
        """Make ready to write the first file of `unit`: a marker of other files goes first.

        Files are overwritten under the same names, often in the same size. Would the marker of
        other settings stay until the end, then after an interrupted run it could vouch for them.
        """
        if self.read_matching(unit, wanted) is None:
            self.store.delete(self.path(unit))

    def finish(
        self,
        unit: str,
        wanted: Wanted,
        files: Iterable[FileRecord],
        counters: dict[str, float] | None = None,
        attempts: int = 1,
    ) -> Marker:
        """Write the marker of `unit`, after its files."""
        marker = Marker(
            unit=unit,
            settings=wanted.settings,
            inputs=wanted.inputs,
            files=tuple(files),
            counters=counters or {},
            attempts=attempts,
        )
        self.write(marker)
        return marker

    def write(self, marker: Marker) -> None:
        """Replace the marker of a unit."""
        self.store.write_text(self.path(marker.unit), marker.model_dump_json(indent=1) + "\n")

    def attempt(self, unit: str, wanted: Wanted) -> int:
        """Number of the run that `unit` is about to get with these settings, from 1.

        A unit in which nothing failed gets no other run: its worker died right after the marker,
        and what it did is done again.
        """
        marker = self.read(unit)
        if marker is None or not marker.fits(wanted):
            return 1
        return marker.attempts + bool(marker.counters.get("dead"))

    def sweep(self, units: Iterable[str]) -> None:
        """Remove files of this stage that no marker lists: what interrupted runs left over."""
        listed = map_in_order(self._paths, units, READERS)
        keep = {path for paths in listed for path in paths}
        for kind in STAGE_KINDS[self.stage]:
            for path in self.store.files(FOLDERS[kind]):
                name = path.rsplit("/", 1)[-1].removeprefix(".")
                if path not in keep and name.startswith(f"{kind}-"):
                    self.store.delete(path)

    def _paths(self, unit: str) -> list[str]:
        marker = self.read(unit)
        return [record.path for record in marker.files] if marker else []


def require_markers(
    dataset_dir: DatasetPath | Store, stage: str, units: Sequence[str]
) -> dict[str, Marker]:
    """The markers that an earlier stage left for units.

    Raises:
        UserError: if that stage has not finished one.
    """
    markers = map_markers(dataset_dir, stage, units, lambda marker: marker)
    return dict(zip(units, markers, strict=True))


def map_markers(
    dataset_dir: DatasetPath | Store,
    stage: str,
    units: Iterable[str],
    function: Callable[[Marker], T],
) -> Iterator[T]:
    """`function` of the marker that an earlier stage left for each unit, in order; none is kept.

    Raises:
        UserError: if that stage has not finished a unit.
    """
    ledger = Ledger(dataset_dir, stage)

    def look(unit: str) -> T:
        marker = ledger.read(unit)
        if marker is None:
            raise UserError(
                f"dataset {ledger.store.root} is not finished with {stage} (unit {unit}): run "
                f"`streamdit ingest --only {stage}` (again) first"
            )
        return function(marker)

    return map_in_order(look, units, READERS)
