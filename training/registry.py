"""Model directories in the MLflow registry: versioned, tagged, found by alias, without pickles."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamdit import __version__
from streamdit.config import StreamDiTConfig
from streamdit.errors import UserError
from streamdit.hashing import file_sha256
from streamdit.io import (
    AUTOENCODER_FOLDER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_weights,
    read_model_config,
)
from streamdit.partition import PartitionScheme
from streamdit.registered import refuse_pickles
from training.config import TrackingConfig
from training.model_card import CARD_FILE, SAMPLE_FILE, model_card
from training.promotion import (
    ASKS_TAG,
    SCORE_TAG,
    Promotion,
    check_metric,
    every_result,
    move_alias,
    read_score,
)
from training.revision import git_revision
from training.run_of_model import run_for, with_run_id
from training.tracking import ALREADY_EXISTS, connect, use_store


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        name: registered model.
        version: its number.
        alias: alias by which it was found or registered, if it has it.
        tracking_uri: store that holds it.
        tags: scheme, ancestry, scores.
        note: why an alias was or was not moved to it.
    """

    name: str
    version: str
    alias: str | None
    tracking_uri: str
    tags: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def uri(self) -> str:
        """What :func:`streamdit.load` takes."""
        suffix = f"@{self.alias}" if self.alias else f"/{self.version}"
        return f"models:/{self.name}{suffix}"


@dataclass(frozen=True)
class Sample:
    """A video of the model, for its card."""

    prompt: str
    video: Path


def register(
    model_directory: Path,
    name: str,
    alias: str | None,
    tracking: TrackingConfig,
    scores: Mapping[str, float] | None = None,
    sample: Sample | None = None,
    promotion: Promotion | None = None,
) -> RegisteredVersion:
    """Log a model directory as an MLflow model, register it and point an alias to it.

    The artifact holds the model directory, a model card and the sample video; no pickles.

    Args:
        model_directory: what `streamdit train` or `streamdit distill` wrote.
        name: registered model, made if it does not exist.
        alias: alias that will point to the new version; None sets none.
        tracking: which store.
        scores: numbers to attach as tags `score.NAME`.
        sample: video for the model card; its prompt is the input example.
        promotion: move the alias only on improvement; the version is registered either way.

    Raises:
        UserError: if the directory is damaged, a score is no number, the metric is missing or the
            store refuses.
    """
    from mlflow.exceptions import MlflowException

    check_names(name, alias)
    scores = dict(scores or {})
    check_scores(scores)
    if promotion is not None:
        check_metric(promotion, scores)
    config = with_run_id(read_model_config(model_directory), Path(model_directory))
    load_weights(model_directory, config)  # refuses damaged weights before anybody can load them
    client, experiment_id = connect(tracking)
    # It stays so, for `streamdit.load("models:/...")` in this process to find the same store.
    uri = use_store(tracking)
    try:
        tags = version_tags(config, scores) | _teacher_tags(client, config)
        tags["config_sha256"] = file_sha256(Path(model_directory) / CONFIG_FILE)
        if promotion is not None and alias is not None:
            tags[ASKS_TAG + alias] = promotion.wanted
        with run_for(client, experiment_id, config, name) as run_id:
            version = _create_version(
                client, run_id, name, Path(model_directory), config, tags, scores, sample
            )
        moved, note = move_alias(client, name, alias, version, scores, promotion)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model {name!r} cannot be registered in {uri}: {reason}; mend the name or the store"
        ) from None
    return RegisteredVersion(name, version, alias if moved else None, uri, tags, note)


def check_names(name: str, alias: str | None) -> None:
    """Refuse what MLflow would refuse too, but only after it has made a version.

    Raises:
        UserError: if the model's name or the alias cannot be one.
    """
    if not name.strip() or re.search(r"[/:'\"`]", name):
        raise UserError(f"model name {name!r} is empty or holds one of / : ' \" `; choose another")
    if alias is None:
        return
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            f"alias {alias!r} is reserved by MLflow, for which it means a version; choose another, "
            "such as best"
        )
    if not re.fullmatch(r"[\w-]+", alias):
        raise UserError(f"alias {alias!r} may hold only letters, digits, _ and -; choose another")


def check_scores(scores: Mapping[str, float]) -> None:
    """Refuse scores that nothing can be compared with.

    Raises:
        UserError: if one has no name or is not finite.
    """
    for name, value in scores.items():
        if not name.strip():
            raise UserError(f"a score of {value:g} has no name; give NAME=VALUE, as colour=0.98")
        if not math.isfinite(value):
            raise UserError(f"score {name} is {value:g}, not a finite number; leave it out")


def _create_version(
    client: Any,
    run_id: str,
    name: str,
    directory: Path,
    config: StreamDiTConfig,
    tags: dict[str, str],
    scores: Mapping[str, float],
    sample: Sample | None,
) -> str:
    """Log the artifact and register it; returns the version's number."""
    import mlflow.pyfunc
    from mlflow.models import Model

    ancestry = {key: value for key, value in tags.items() if not key.startswith(SCORE_TAG)}
    card = model_card(name, config, ancestry, scores, sample.prompt if sample else None)
    with tempfile.TemporaryDirectory() as staging:
        data = Path(staging) / "model"
        # Only what the contract of a model directory names: nothing else has been checked.
        shutil.copytree(directory, data, ignore=_all_but_the_model(directory))
        refuse_pickles(data, str(directory))
        (data / CARD_FILE).write_text(card, encoding="utf-8")
        if sample is not None:
            shutil.copyfile(sample.video, data / SAMPLE_FILE)
        # Not `log_model`, which needs an active run: to activate one ends it anew, whatever it was.
        run = client.get_run(run_id)
        place = client.create_logged_model(
            run.info.experiment_id, "model", run_id, params=dict(run.data.params)
        )
        logged = Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            model_id=place.model_id,
            loader_module="streamdit.pyfunc",
            data_path=str(data),
            signature=_signature(),
            input_example=_input_example(sample.prompt if sample else None),
            pip_requirements=[f"streamdit=={__version__}"],
            metadata={"format_version": config.format_version},
        )
    _ensure_name(client, name)
    created = client.create_model_version(
        name,
        logged.model_uri,
        run_id=run_id,
        model_id=logged.model_id,
        tags=tags,
        description=card.split("---\n", 2)[-1].strip(),
    )
    return str(created.version)


def _ensure_name(client: Any, name: str) -> None:
    """Make the registered model, unless it is there: another client may be making it too."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ALREADY_EXISTS:
            raise


def _all_but_the_model(directory: Path) -> Any:
    """What `shutil.copytree` shall leave out at the top of a model directory."""
    kept = {CONFIG_FILE, WEIGHTS_FILE, AUTOENCODER_FOLDER}
    return lambda folder, names: [
        entry for entry in names if Path(folder) == directory and entry not in kept
    ]


def find_registered(name: str, alias: str, tracking: TrackingConfig) -> RegisteredVersion | None:
    """The version that an alias points to, or None; its store is then the process's own."""
    from mlflow.exceptions import MlflowException

    client, _ = connect(tracking)
    uri = use_store(tracking)
    try:
        version = client.get_model_version_by_alias(name, alias)
    except MlflowException:
        return None
    return RegisteredVersion(name, str(version.version), alias, uri, dict(version.tags))


def list_versions(tracking: TrackingConfig, name: str | None = None) -> list[dict[str, Any]]:
    """Every version in a store (of one model, if named), newest first, as plain values.

    Raises:
        UserError: if the store cannot be reached, or has no model of that name.
    """
    client, _ = connect(tracking)
    models = every_result(client.search_registered_models, f"name = '{name}'" if name else None)
    if name and not models:
        known = ", ".join(model.name for model in every_result(client.search_registered_models))
        raise UserError(
            f"no model {name!r} is registered in {use_store(tracking)}; it has {known or 'none'}"
        )
    rows = []
    for model in models:
        versions = every_result(client.search_model_versions, f"name = '{model.name}'")
        for version in sorted(versions, key=lambda v: int(v.version), reverse=True):
            holders = model.aliases.items()
            tags = dict(version.tags)
            found = {k: read_score(v) for k, v in tags.items() if k.startswith(SCORE_TAG)}
            scores = {k: score for k, score in found.items() if score is not None}
            rows.append(
                {
                    "name": model.name,
                    "version": int(version.version),
                    "aliases": sorted(a for a, v in holders if str(v) == str(version.version)),
                    "created_ms": version.creation_timestamp,
                    "tags": {k: v for k, v in tags.items() if k not in scores},
                    "scores": {k.removeprefix(SCORE_TAG): v for k, v in scores.items()},
                }
            )
    return rows


def version_tags(config: StreamDiTConfig, scores: Mapping[str, float]) -> dict[str, str]:
    """Tags of a version: scheme, ancestry and scores."""
    scheme = PartitionScheme.from_sampling(config.model.buffer_frames, config.sampling)
    tags = {
        "K": str(scheme.K),
        "N": str(scheme.N),
        "c": str(scheme.c),
        "s": str(scheme.s),
        "guidance_scale": f"{config.sampling.guidance_scale:g}",
        "weights_sha256": config.weights_sha256,
    }
    for key in ("dataset_fingerprint", "parent", "run_id", "step"):
        if config.lineage.get(key) is not None:
            tags[key] = str(config.lineage[key])
    # Of the code that trained the model; of that which registers it where that is not known.
    revision = config.lineage.get("git_revision") or git_revision()
    if revision:
        tags["git_revision"] = str(revision)
    return tags | {f"{SCORE_TAG}{key}": repr(float(value)) for key, value in scores.items()}


def _teacher_tags(client: Any, config: StreamDiTConfig) -> dict[str, str]:
    """Which teacher a model was distilled from: a registered version, if this store has it."""
    if config.distilled is None:
        return {}
    sha256 = config.distilled.teacher_sha256
    known = client.search_model_versions(f"tags.`weights_sha256` = '{sha256}'")
    tags = {"teacher_sha256": sha256, "teacher_s": str(config.distilled.teacher_micro_steps)}
    if known:
        tags["teacher"] = f"{known[0].name}/{known[0].version}"
    return tags


def _input_example(prompt: str | None) -> Any:
    """A table of one prompt."""
    import pandas as pd

    return pd.DataFrame({"prompt": [prompt or "a boat on a lake"]})


def _signature() -> Any:
    """Prompts in; frames and seed as parameters."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        params=ParamSchema([ParamSpec("frames", "long", 32), ParamSpec("seed", "long", 0)]),
    )
