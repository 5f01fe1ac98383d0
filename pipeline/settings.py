"""The settings that each stage of a dataset was made with, so that a change is never silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.config import IngestConfig
from pipeline.ledger import LEDGER_FOLDER, fingerprint
from pipeline.store import Store
from streamdit.config import AutoencoderIdentity, StrictModel
from streamdit.errors import UserError

SHOWN = 3


class StageRecord(StrictModel):
    """`ledger/{stage}.json`: how the units of a stage are made."""

    settings: dict[str, Any]
    """What its files depend on, by dotted key."""
    config: IngestConfig
    """The whole configuration, to do units again."""
    autoencoder: AutoencoderIdentity | None = None
    """Of the stages that need one; a relative source is relative to the dataset."""

    @property
    def fingerprint(self) -> str:
        """Hash of the settings."""
        return fingerprint(self.settings)


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """Hash that :func:`adopt_settings` gives to the settings of a stage."""
    return fingerprint(flatten(settings))


def read_record(store: Store, stage: str) -> StageRecord | None:
    """The record of a stage; none where it never ran, or with another version."""
    try:
        return StageRecord.model_validate_json(store.read_text(_path(stage)))
    except (FileNotFoundError, ValidationError):
        return None


def adopt_settings(
    store: Store,
    settings: Mapping[str, Mapping[str, Any]],
    config: IngestConfig,
    autoencoder: AutoencoderIdentity | None = None,
    replace: bool = True,
) -> dict[str, str]:
    """Record the settings of stages that are about to run.

    Args:
        store: the dataset.
        settings: by stage, what the files of its units depend on.
        config: the whole configuration.
        autoencoder: identity, where the stages have one.
        replace: whether units made with other settings may be done again.

    Returns:
        Hash of the settings of each stage.

    Raises:
        UserError: naming what changed, if there are units made with other settings; then nothing
            is recorded.
    """
    known = {stage: read_record(store, stage) for stage in settings}
    records = {
        stage: StageRecord(settings=flatten(values), config=config, autoencoder=autoencoder)
        for stage, values in settings.items()
    }
    if not replace:
        for stage, record in records.items():
            _refuse_change(store, stage, known[stage], record)
    for stage, record in records.items():
        if record != known[stage]:
            store.write_text(_path(stage), record.model_dump_json(indent=1) + "\n")
    return {stage: record.fingerprint for stage, record in records.items()}


def _refuse_change(store: Store, stage: str, known: StageRecord | None, new: StageRecord) -> None:
    """Raise if there are units that were made with other settings."""
    if known is None or known.settings == new.settings:
        return
    if units := store.files(f"{LEDGER_FOLDER}/{stage}"):
        raise UserError(
            f"dataset {store.root} has {len(units)} units of {stage} with other settings "
            f"({_changes(known.settings, new.settings)}): keep those settings, write to another "
            "--out, or give --replace to make them again"
        )


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys; other values as JSON knows them."""
    if not isinstance(values, Mapping):
        return {prefix: list(values) if isinstance(values, tuple) else values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    shown = [f"{name} {_short(old.get(name))} → {_short(new.get(name))}" for name in names[:SHOWN]]
    if len(names) > SHOWN:
        shown.append(f"{len(names) - SHOWN} more")
    return ", ".join(shown)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _path(stage: str) -> str:
    return f"{LEDGER_FOLDER}/{stage}.json"
