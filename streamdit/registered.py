"""Models in an MLflow registry: fetched by name and alias, and checked before they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from streamdit.errors import UserError
from streamdit.hashing import file_sha256
from streamdit.io import CONFIG_FILE, WEIGHTS_FILE, read_model_config

PICKLES = {".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
"""Suffixes of files that hold pickles, or may."""


def cache_folder() -> Path:
    """Where models from other machines are kept: `STREAMDIT_CACHE`, or the user's own cache."""
    if chosen := os.environ.get("STREAMDIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamdit"


def download(uri: str) -> Path:
    """Find the model directory of a registered model, fetching it if it is on another machine.

    What was fetched is kept in :func:`cache_folder` and found there the next time.

    Args:
        uri: `models:/name@alias` or `models:/name/version`.

    Raises:
        UserError: if it cannot be found, holds a pickle, or has other weights than were registered.
    """
    try:
        import mlflow.artifacts
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
        from mlflow.utils.file_utils import local_file_uri_to_path
        from mlflow.utils.uri import is_local_uri
    except ImportError:
        raise UserError(
            f"{uri} is in an MLflow registry, but mlflow is not installed; pip install mlflow"
        ) from None
    unreachable: tuple[type[Exception], ...] = (MlflowException, OSError, *_errors_of_s3())
    try:
        version = _find_version(uri)
        # The alias may move meanwhile; the version stays what it is.
        fixed = f"models:/{version.name}/{version.version}"
        place = ModelsArtifactRepository.get_underlying_uri(fixed)
        if is_local_uri(place):
            # Not downloaded from, which would write a note into the store.
            return _checked(Path(local_file_uri_to_path(place)), uri, version)
        kept = _place_of(version)
        if not kept.is_dir():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".partial-") as staging:
                fetched = Path(staging) / "artifact"
                fetched.mkdir()
                mlflow.artifacts.download_artifacts(artifact_uri=fixed, dst_path=str(fetched))
                _checked(fetched, uri, version)
                try:
                    fetched.rename(kept)
                except OSError:
                    if not kept.is_dir():  # else another process was faster
                        raise
    except unreachable as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{uri} cannot be loaded: {reason}; check the name and alias, and that "
            "MLFLOW_TRACKING_URI points to the store that holds it"
        ) from None
    return _checked(kept, uri, version)


def _errors_of_s3() -> tuple[type[Exception], ...]:
    """What the client of an artifact store raises, where one is installed."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    return BotoCoreError, ClientError


def _find_version(uri: str) -> Any:
    """The version that a URI means now, as MLflow describes it."""
    from mlflow import MlflowClient
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    client = MlflowClient()
    found = get_model_name_and_version(client, uri)
    if len(found) != 2:
        raise UserError(f"{uri} names no version; give models:/NAME@ALIAS or models:/NAME/VERSION")
    return client.get_model_version(*found)


def _place_of(version: Any) -> Path:
    """Folder of a version in the cache; no two versions of any stores share one."""
    import mlflow

    store = hashlib.sha256(mlflow.get_registry_uri().encode()).hexdigest()[:12]
    # A model that was removed and made again has the same version with another content.
    known = [version.tags.get(tag) for tag in ("weights_sha256", "config_sha256")]
    content = json.dumps(known if all(known) else version.creation_timestamp)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = f"{version.name}-{version.version}-{digest}"
    return cache_folder() / "models" / store / folder


def _checked(root: Path, uri: str, version: Any) -> Path:
    """The model directory inside an artifact, if it is the one that was registered.

    Raises:
        UserError: if it is not, or holds a pickle.
    """
    refuse_pickles(root, uri)
    for path in sorted(root.rglob(CONFIG_FILE)):
        if (path.parent / WEIGHTS_FILE).is_file():
            found = {
                "weights": read_model_config(path.parent).weights_sha256,
                "config": file_sha256(path),  # which has the hash of an autoencoder beside it
            }
            for what, digest in found.items():
                recorded = version.tags.get(f"{what}_sha256")
                if recorded and digest != recorded:
                    raise UserError(
                        f"{uri} holds {what} {digest[:12]}... but the registry recorded "
                        f"{recorded[:12]}...; the artifact was changed, register the model again"
                    )
            return path.parent
    raise UserError(f"{uri} holds no model directory; register one with `streamdit register`")


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
