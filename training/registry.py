"""Model directories in the MLflow registry: versioned, tagged, found by alias, without pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamdit import __version__
from streamdit.config import StreamDiTConfig
from streamdit.errors import UserError
from streamdit.io import load_weights, read_model_config
from streamdit.partition import PartitionScheme
from training.config import TrackingConfig
from training.tracking import connect, git_revision, use_store


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model."""

    name: str
    version: str
    alias: str | None
    tracking_uri: str
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """What :func:`streamdit.load` takes."""
        suffix = f"@{self.alias}" if self.alias else f"/{self.version}"
        return f"models:/{self.name}{suffix}"


def register(
    model_directory: Path,
    name: str,
    alias: str | None,
    tracking: TrackingConfig,
    scores: Mapping[str, float] | None = None,
) -> RegisteredVersion:
    """Log a model directory as an MLflow model, register it and point an alias to it.

    Args:
        model_directory: what `streamdit train` or `streamdit distill` wrote.
        name: registered model, made if it does not exist.
        alias: alias that will point to the new version; None sets none.
        tracking: which store.
        scores: numbers to attach as tags `score.NAME`.

    Raises:
        UserError: if the directory is damaged or the store refuses.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    config = read_model_config(model_directory)
    load_weights(model_directory, config)  # refuses damaged weights before anybody can load them
    client, experiment_id = connect(tracking)
    # It stays so, for `streamdit.load("models:/...")` in this process to find the same store.
    uri = use_store(tracking)
    tags = version_tags(config, scores or {})
    run_id = (
        _run_of(client, config)
        or client.create_run(experiment_id, run_name=f"register-{name}").info.run_id
    )
    try:
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.pyfunc.log_model(
                name="model",
                loader_module="streamdit.io",
                data_path=str(model_directory),
                signature=_signature(),
                input_example=_input_example(),
                pip_requirements=[f"streamdit=={__version__}"],
                metadata={"format_version": config.format_version},
            )
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        created = client.create_model_version(
            name, logged.model_uri, run_id=run_id, model_id=logged.model_id, tags=tags
        )
        version = str(created.version)
        if alias is not None:
            client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model {name!r} cannot be registered in {uri}: {reason}; mend the name or the store"
        ) from None
    return RegisteredVersion(name, version, alias, uri, tags)


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
    revision = git_revision()
    if revision:
        tags["git_revision"] = revision
    return tags | {f"score.{key}": f"{value:.4f}" for key, value in scores.items()}


def _run_of(client: Any, config: StreamDiTConfig) -> str | None:
    """The run that made the model, if this store knows it."""
    from mlflow.exceptions import MlflowException

    run_id = config.lineage.get("run_id")
    if not run_id:
        return None
    try:
        client.get_run(run_id)
    except MlflowException:
        return None
    return str(run_id)


def _input_example() -> Any:
    """A table of one prompt."""
    import pandas as pd

    return pd.DataFrame({"prompt": ["a red circle moving left over a blue background"]})


def _signature() -> Any:
    """Prompts in; frames and seed as parameters."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        params=ParamSchema([ParamSpec("frames", "long", 32), ParamSpec("seed", "long", 0)]),
    )
