"""Where a run's figures go: the metrics file beside it, and MLflow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from streamdit.files import replace_text
from training.job import TrainJob
from training.metrics import MetricsFile
from training.tracking import ARTIFACTS, Tracker, tracking_uri

RUN_FILE = "mlflow-run.json"


def outbox_path(job: TrainJob, machine: str = "") -> Path:
    """Where records wait that the store does not take: the main rank's, or a machine's load.

    Those of another run that was begun in the same directory before keep to themselves.
    """
    return Path(job.out) / f"mlflow-outbox-{job.fingerprint()}{machine and '-'}{machine}.jsonl"


class Records:
    """Records of a run. The main rank keeps them; those of other ranks ignore every call.

    Args:
        job: what is recorded.
        dataset_fingerprint: identity of the data set.
        step: step that the run continues from.
        run_id: MLflow run to continue, if any.
        keep: whether this rank keeps the records.
    """

    def __init__(
        self, job: TrainJob, dataset_fingerprint: str, step: int, run_id: str | None, keep: bool
    ) -> None:
        self._metrics: MetricsFile | None = None
        self._tracker: Tracker | None = None
        if not keep:
            return
        self._metrics = MetricsFile(job.metrics_path, step)
        known, fingerprint = known_run(job), job.fingerprint()
        began_ms = known.began_ms or int(time.time() * 1000)
        write = partial(_note_run, job, fingerprint, began_ms)
        self._tracker = Tracker.start(
            job.config.tracking,
            job.run_name,
            params=_parameters(job),
            tags={
                "dataset": job.dataset,
                "dataset_fingerprint": dataset_fingerprint,
                "fingerprint": fingerprint,
                **job.tags,
            },
            run_id=run_id or known.run_id,
            outbox=outbox_path(job),
            on_made=write,
            may_be_away=job.store_may_be_away,
            began_ms=began_ms,
        )
        self._tracker.note(write)

    @property
    def run_id(self) -> str | None:
        """MLflow run, on the main rank."""
        return self._tracker.run_id if self._tracker else None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of a step."""
        if self._metrics is not None and self._tracker is not None:
            self._metrics.write({"step": step, **figures})
            self._tracker.log(step, figures)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the MLflow run."""
        if self._tracker is not None:
            self._tracker.tag(key, value)

    def artifact(self, path: Path, folder: str) -> None:
        """Copy a file or a folder into the MLflow run."""
        if self._tracker is not None:
            self._tracker.artifact(path, folder)

    def close(self, status: str) -> None:
        """Close the records with MLflow's name for how the run ended."""
        if self._metrics is not None:
            self._metrics.close()
        if self._tracker is not None:
            self._tracker.finish(status)


def send_left(job: TrainJob) -> int:
    """Send what a finished run could not, now that its server may be back.

    Returns:
        Records that still wait; 0 also where none did.
    """
    out, left = Path(job.out), 0
    found = out.glob(f"{outbox_path(job).stem}*.jsonl")  # of machines too
    # Either file of a pair may be there alone; a tracker sends both.
    for name in sorted({path.name.replace(ARTIFACTS, ".jsonl") for path in found}):
        known = known_run(job)  # anew, for the first may have to make it
        began_ms = known.began_ms or int(time.time() * 1000)
        tracker = Tracker.take_up(
            job.config.tracking,
            job.run_name,
            known.run_id,
            out / name,
            partial(_note_run, job, job.fingerprint(), began_ms),
            began_ms,
        )
        left += tracker.leave()
    return left


class KnownRun(NamedTuple):
    """The MLflow run of a job, as far as it is known.

    Attributes:
        run_id: None if it is not made yet.
        began_ms: when the job began, in milliseconds since 1970.
    """

    run_id: str | None = None
    began_ms: int | None = None


def _note_run(job: TrainJob, fingerprint: str, began_ms: int, run_id: str | None) -> None:
    """Write down which MLflow run is this very job's, if it has one yet."""
    known = {"run_id": run_id, "began_ms": began_ms, "fingerprint": fingerprint}
    uri = tracking_uri(job.config.tracking)
    if not urlsplit(uri).password:
        known["tracking_uri"] = uri
    replace_text(Path(job.out) / RUN_FILE, json.dumps(known) + "\n")


def known_run(job: TrainJob) -> KnownRun:
    """MLflow run of this very job, begun before its first checkpoint."""
    path = Path(job.out) / RUN_FILE
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("fingerprint") != job.fingerprint():
        return KnownRun()
    return KnownRun(known.get("run_id"), known.get("began_ms"))


def _parameters(job: TrainJob) -> dict[str, Any]:
    """All settings of a run, nested."""
    shape = {"model": job.model, "partition": job.partition, "sampling": job.sampling}
    return job.config.model_dump(mode="json") | {
        name: part.model_dump(mode="json") for name, part in shape.items()
    }
