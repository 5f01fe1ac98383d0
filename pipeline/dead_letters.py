"""Inputs that failed: one row each, so that nothing is lost without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.child import CRASHED, TIMED_OUT, ChildError
from pipeline.config import LimitsConfig
from pipeline.schema import DEAD_LETTER_SCHEMA, FOLDERS, read_tables
from pipeline.shards import write_table
from pipeline.store import DatasetPath, Store, open_store
from streamdit.errors import UserError

LISTING = "listing"
REASONS_SHOWN = 3
QUARANTINE = (CRASHED, TIMED_OUT)


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


def write_dead_letters(
    dataset_dir: DatasetPath | Store, stage: str, unit: str, letters: list[DeadLetter]
) -> None:
    """Replace the dead letters of a unit; without any there is no file."""
    store, path = open_store(dataset_dir), dead_letter_file(stage, unit)
    if letters:
        rows: list[dict[str, Any]] = [asdict(letter) for letter in letters]
        write_table(store, path, "dead", rows, DEAD_LETTER_SCHEMA)
    else:
        store.delete(path)


def read_unit_dead_letters(
    dataset_dir: DatasetPath | Store, stage: str, unit: str
) -> list[DeadLetter]:
    """The dead letters of a unit."""
    store, path = open_store(dataset_dir), dead_letter_file(stage, unit)
    try:
        table = pq.read_table(store.source(path))
    except FileNotFoundError:
        return []
    return [DeadLetter(**row) for row in table.to_pylist()]


def quarantined(store: Store, stages: Iterable[str], unit: str) -> dict[str | None, DeadLetter]:
    """Sources of a unit that crashed or hung a decoder in one of `stages`, with the reason.

    They are left alone until `--retry-dead`: each further try costs a process or a deadline.
    """
    return {
        letter.source_id: letter
        for stage in stages
        for letter in read_unit_dead_letters(store, stage, unit)
        if letter.error_class in QUARANTINE
    }


class DeadLimit:
    """Stops a stage of which too large a share fails: then something is wrong with the whole.

    What is done by then is kept.
    """

    def __init__(self, store: Store, stage: str, limits: LimitsConfig) -> None:
        self.store = store
        self.stage = stage
        self.limits = limits

    def check(self, totals: Mapping[str, float]) -> None:
        """Look at the totals so far, of which `inputs` and `lost` count.

        Raises:
            UserError: if too many inputs failed, with the commonest reasons.
        """
        inputs, dead = int(totals.get("inputs", 0)), int(totals.get("lost", 0))
        if inputs < self.limits.least_inputs or dead <= self.limits.dead_share * inputs:
            return
        raise UserError(
            f"{self.stage} stops: {dead:,} of {inputs:,} inputs failed, more than "
            f"{self.limits.dead_share:.0%} ({self._reasons()}); mend the cause and run the same "
            "command with --retry-dead, or raise limits.dead_share to accept it"
        )

    def _reasons(self) -> str:
        """The commonest error classes, each with one message."""
        folder = f"{FOLDERS['dead']}/{self.stage}"
        tables = read_tables(self.store, folder, DEAD_LETTER_SCHEMA)
        rows = pa.concat_tables(tables).to_pylist() if tables else []
        example = {row["error_class"]: f"{row['message']}, {row['uri']}" for row in reversed(rows)}
        counts = Counter(row["error_class"] for row in rows).most_common(REASONS_SHOWN)
        return "; ".join(f"{count:,} × {name}: {example[name]}" for name, count in counts)
