"""What a training run is, before anything of it has happened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.schema import MANIFEST_FILE
from pipeline.store import open_store
from streamdit.config import DistillationRecord, DiTConfig, PartitionConfig, SamplingConfig
from streamdit.hashing import file_sha256
from training.config import RunConfig

MakeObjective = Callable[..., Any]
"""`(job, device) -> training.objective.Objective`; a module-level function."""

FREE_SETTINGS = (
    *("launch", "tracking", "data", "log_every", "checkpoint", "validation", "skip_limit"),
    *("micro_batch", "zero_stage", "offload_optimizer"),
    *("activation_checkpointing", "compile_blocks"),
)
"""Settings that may change between parts of a run: its numbers stay the same, with those of the
second and third line up to rounding."""


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs to take part in a run.

    Attributes:
        config: how to train; its class may carry more for its objective.
        model: shape of the transformer.
        partition: partitions and noise schedule that the result will have been trained with.
        sampling: how the result is sampled by default.
        dataset: dataset directory or `s3://` prefix.
        out: directory of the run: checkpoints, metrics, and the model directory at the end.
        make_objective: `(job, device) -> objective`; a module-level function.
        run_name: name in MLflow.
        parent: model directory to start from; None starts from random weights.
        tags: MLflow tags.
        distilled: what the result will have been distilled for; None for other training.
        store_may_be_away: whether the run may begin while the MLflow store cannot be reached.
    """

    config: RunConfig
    model: DiTConfig
    partition: PartitionConfig
    sampling: SamplingConfig
    dataset: str
    out: str
    make_objective: MakeObjective
    run_name: str = "train"
    parent: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    distilled: DistillationRecord | None = None
    store_may_be_away: bool = False

    @property
    def model_directory(self) -> Path:
        """Where the trained model will be."""
        return Path(self.out) / "model"

    @property
    def metrics_path(self) -> Path:
        """Metrics of the run, a JSON object per line."""
        return Path(self.out) / "metrics.jsonl"

    def identity(self) -> dict[str, Any]:
        """All that decides the run's numbers: configuration, data set and parent."""
        settings = self.config.model_dump(mode="json", exclude=set(FREE_SETTINGS))
        for part, values in self.config.free_parts.items():
            settings[part] |= values
        for name in ("model", "partition", "sampling"):
            settings[name] = getattr(self, name).model_dump(mode="json")
        settings["dataset"] = open_store(self.dataset).sha256(MANIFEST_FILE)
        if self.parent:
            settings["parent"] = file_sha256(Path(self.parent) / "config.json")
        return settings

    def fingerprint(self) -> str:
        """Hash of :meth:`identity`."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def finished(self) -> bool:
        """Whether the model directory is there and was made by exactly this job."""
        path = self.model_directory / "config.json"
        if not path.is_file():
            return False
        lineage = json.loads(path.read_text()).get("lineage", {})
        return bool(lineage.get("fingerprint") == self.fingerprint())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting by which two identities of :meth:`TrainJob.identity` differ, in words."""
    # What was read from a file has lists where there were tuples.
    old, new = (flatten(json.loads(json.dumps(settings))) for settings in (before, now))
    key = next((key for key in sorted(old | new) if old.get(key) != new.get(key)), None)
    if key is None:
        return "other settings"
    if key in ("dataset", "parent"):
        return f"another {key}"
    return f"{key}={_short(old.get(key))}, not {_short(new.get(key))}"


def _short(value: Any, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"
