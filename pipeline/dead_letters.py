"""Inputs that failed: one row each, so that nothing is lost without a word."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.child import ChildError
from pipeline.schema import DEAD_LETTER_SCHEMA, FOLDERS
from pipeline.shards import write_table

LISTING = "listing"


@dataclass(frozen=True)
class DeadLetter:
    """What failed, where and why."""

    source_id: str | None
    uri: str
    stage: str
    error_class: str
    message: str
    retryable: bool
    attempts: int = 1
    start_s: float | None = None
    end_s: float | None = None

    @staticmethod
    def of(
        error: ChildError,
        *,
        source_id: str,
        uri: str,
        stage: str,
        attempts: int,
        span: tuple[float, float] | tuple[None, None] = (None, None),
    ) -> DeadLetter:
        """The row for a call in a child process that failed."""
        return DeadLetter(
            source_id=source_id,
            uri=uri,
            stage=stage,
            error_class=error.error_class,
            message=error.message,
            retryable=error.retryable,
            attempts=attempts,
            start_s=span[0],
            end_s=span[1],
        )


def dead_letter_file(stage: str, unit: str) -> str:
    """Where the dead letters of a unit lie, relative to the dataset directory."""
    return f"{FOLDERS['dead']}/{stage}/dead-{unit}.parquet"


def write_dead_letters(dataset_dir: Path, stage: str, unit: str, letters: list[DeadLetter]) -> None:
    """Replace the dead letters of a unit; without any there is no file."""
    path = dead_letter_file(stage, unit)
    if letters:
        rows: list[dict[str, Any]] = [asdict(letter) for letter in letters]
        write_table(dataset_dir, path, "dead", rows, DEAD_LETTER_SCHEMA)
    else:
        (dataset_dir / path).unlink(missing_ok=True)


def read_unit_dead_letters(dataset_dir: Path, stage: str, unit: str) -> list[DeadLetter]:
    """The dead letters of a unit."""
    path = dataset_dir / dead_letter_file(stage, unit)
    if not path.exists():
        return []
    return [DeadLetter(**row) for row in pq.read_table(path).to_pylist()]
