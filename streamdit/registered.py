"""Models in an MLflow registry: fetched by name and alias, and checked before they are loaded."""

from __future__ import annotations

from pathlib import Path

from streamdit.errors import UserError
from streamdit.io import CONFIG_FILE, WEIGHTS_FILE, read_model_config

PICKLES = {".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
"""Suffixes of files that hold pickles, or may."""


def download(uri: str) -> Path:
    """Fetch a registered model from MLflow and find the model directory inside it.

    Args:
        uri: `models:/name@alias` or `models:/name/version`.

    Raises:
        UserError: if it cannot be found, holds a pickle, or has other weights than were registered.
    """
    try:
        import mlflow.artifacts
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise UserError(
            f"{uri} is in an MLflow registry, but mlflow is not installed; pip install mlflow"
        ) from None
    try:
        recorded = _recorded_hash(uri)
        root = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{uri} cannot be loaded: {reason}; check the name and alias, and that "
            "MLFLOW_TRACKING_URI points to the store that holds it"
        ) from None
    refuse_pickles(root, uri)
    for path in sorted(root.rglob(CONFIG_FILE)):
        if (path.parent / WEIGHTS_FILE).is_file():
            found = read_model_config(path.parent).weights_sha256
            if recorded and found != recorded:
                raise UserError(
                    f"{uri} holds weights {found[:12]}... but the registry recorded "
                    f"{recorded[:12]}...; the artifact was changed, register the model again"
                )
            return path.parent
    raise UserError(f"{uri} holds no model directory; register one with `streamdit register`")


def _recorded_hash(uri: str) -> str | None:
    """Hash of the weights as the registry's tags have it, if they do."""
    from mlflow import MlflowClient

    client = MlflowClient()
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at:
        tags = client.get_model_version_by_alias(name, alias).tags
    else:
        name, _, version = name.partition("/")
        if not version.isdigit():
            return None
        tags = client.get_model_version(name, version).tags
    recorded: str | None = tags.get("weights_sha256")
    return recorded


def refuse_pickles(root: Path, source: str) -> None:
    """Refuse an artifact that holds a file which runs code when it is loaded.

    Raises:
        UserError: naming the file.
    """
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise UserError(
                f"{source} holds {path.relative_to(root)}, a pickle, which can run code when it is "
                "loaded; register the model directory again with `streamdit register`"
            )
