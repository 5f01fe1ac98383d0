"""What is done: one marker per stage and unit, written last.

A rerun skips a unit whose marker carries the fingerprint that it would get now, and does every
other one again under the same file names, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from pipeline.schema import FOLDERS, FileRecord
from streamdit.config import StrictModel

LEDGER_FOLDER = "ledger"
MAX_ATTEMPTS = 3

STAGE_KINDS: dict[str, tuple[str, ...]] = {
    "curate": ("source", "clip"),
    "annotate": ("annotation",),
    "latents": ("latent",),
    "text": ("text",),
}
"""Kinds of files that each stage writes for a unit."""


class Marker(StrictModel):
    """A finished unit of a stage."""

    unit: str
    """Name of the unit."""
    fingerprint: str
    """Hash of everything that the unit's files depend on."""
    files: tuple[FileRecord, ...] = ()
    """What was written."""
    counters: dict[str, float] = Field(default_factory=dict)
    """Totals for summaries."""
    attempts: int = 1
    """Runs so far that ended with this fingerprint."""


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


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)


def partial_path(path: Path) -> Path:
    """Hidden name under which `path` is written; a rerun overwrites what a crash left there."""
    return path.with_name(f".{path.name}.partial")


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, after its bytes are on disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


class Ledger:
    """Markers of one stage of a dataset directory."""

    def __init__(self, dataset_dir: Path | str, stage: str) -> None:
        self.dataset_dir = Path(dataset_dir)
        self.stage = stage

    def path(self, unit: str) -> Path:
        """Where the marker of `unit` lies."""
        return self.dataset_dir / LEDGER_FOLDER / self.stage / f"{unit}.json"

    def read(self, unit: str) -> Marker | None:
        """The marker of `unit`; none where there is none, or one of another version."""
        try:
            return Marker.model_validate_json(self.path(unit).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError):
            return None

    def read_matching(self, unit: str, wanted: str) -> Marker | None:
        """The marker of `unit` if its fingerprint is `wanted` and its files are still there."""
        marker = self.read(unit)
        if marker is None or marker.fingerprint != wanted:
            return None
        return marker if all(self._is_intact(record) for record in marker.files) else None

    def read_done(self, unit: str, wanted: str) -> Marker | None:
        """The marker of `unit` if it needs no work, else none.

        Inputs that failed for a passing reason get :data:`MAX_ATTEMPTS` runs in all.
        """
        marker = self.read_matching(unit, wanted)
        if marker and marker.counters.get("retryable") and marker.attempts < MAX_ATTEMPTS:
            return None
        return marker

    def attempt(self, unit: str, wanted: str) -> int:
        """Number of the run that `unit` is about to get with this fingerprint, from 1."""
        marker = self.read(unit)
        return marker.attempts + 1 if marker and marker.fingerprint == wanted else 1

    def finish(
        self,
        unit: str,
        wanted: str,
        files: Iterable[FileRecord],
        counters: dict[str, float],
    ) -> Marker:
        """Write the marker of `unit`, then remove what an earlier run of it left over."""
        marker = Marker(
            unit=unit,
            fingerprint=wanted,
            files=tuple(files),
            counters=counters,
            attempts=self.attempt(unit, wanted),
        )
        write_atomically(self.path(unit), marker.model_dump_json(indent=1) + "\n")
        self._sweep(unit, {record.path for record in marker.files})
        return marker

    def _sweep(self, unit: str, keep: set[str]) -> None:
        for kind in STAGE_KINDS[self.stage]:
            for pattern in (f"{kind}-{unit}-*", f".{kind}-{unit}-*.partial"):
                for path in (self.dataset_dir / FOLDERS[kind]).glob(pattern):
                    if path.relative_to(self.dataset_dir).as_posix() not in keep:
                        path.unlink()

    def _is_intact(self, record: FileRecord) -> bool:
        path = self.dataset_dir / record.path
        return path.exists() and path.stat().st_size == record.bytes
