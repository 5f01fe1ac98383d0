"""Runs in MLflow. A tracking server that is lost delays what is logged, it never stops a run."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streamdit.errors import UserError
from training.config import TrackingConfig

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 30.0


def tracking_uri(config: TrackingConfig) -> str:
    """The store that a configuration means: its own, the environment's, or the embedded one."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(config.directory)


def embedded_uri(directory: str) -> str:
    """SQLite store in `directory`."""
    return f"sqlite:///{Path(directory).resolve()}/mlflow.db"


def use_store(config: TrackingConfig) -> str:
    """Make a store the one that `models:/...` means in this process; returns its URI."""
    import mlflow

    uri = tracking_uri(config)
    mlflow.set_tracking_uri(uri)
    return uri


def pinned(config: TrackingConfig) -> TrackingConfig:
    """The same store, named so that a process in another folder or machine finds it too."""
    directory = str(Path(config.directory).resolve())
    return config.model_copy(update={"uri": tracking_uri(config), "directory": directory})


def connect(config: TrackingConfig) -> tuple[Any, str]:
    """MLflow client and experiment id; makes the embedded store and the experiment if need be.

    Raises:
        UserError: if the store cannot be reached.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(config)
    location = None
    if uri == embedded_uri(config.directory):
        folder = Path(config.directory).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Without it a SQLite store puts artifacts into ./mlruns of the current directory.
        location = (folder / "artifacts").as_uri()
    # The first failed request tells; the tracker itself retries later.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is not None:
            return client, experiment.experiment_id
        return client, client.create_experiment(config.experiment, artifact_location=location)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MLflow store {uri} cannot be used: {reason}; start the server, or correct "
            "tracking.uri or MLFLOW_TRACKING_URI"
        ) from None


def git_revision() -> str | None:
    """Revision of the checkout that the code runs from, or None outside one."""
    folder = Path(__file__).parent
    result = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None if result.returncode == 0 else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested configuration as dotted parameters."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:500]
    return flat


class Tracker:
    """One MLflow run. Calls that fail are kept and tried again; the run goes on meanwhile."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._pending: list[Callable[[], Any]] = []
        self._retry_at = 0.0

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> Tracker:
        """Open a run, or continue the run `run_id` after a resume.

        Args:
            config: which store.
            run_name: name that people see.
            params: nested parameters; written as dotted names.
            tags: further tags; the git revision is added.
            run_id: run to continue.
        """
        from mlflow.entities import Param

        client, experiment_id = connect(config)
        if run_id is not None and cls._exists(client, run_id):
            client.update_run(run_id, status="RUNNING")
            return cls(client, run_id)
        all_tags = {"mlflow.runName": run_name, **(tags or {})}
        revision = git_revision()
        if revision:
            all_tags["mlflow.source.git.commit"] = revision
        run = client.create_run(experiment_id, run_name=run_name, tags=all_tags)
        tracker = cls(client, run.info.run_id)
        flat = list(flatten(params or {}).items())
        for start in range(0, len(flat), 100):
            batch = [Param(key, value) for key, value in flat[start : start + 100]]
            tracker.send_params(batch)
        return tracker

    @staticmethod
    def _exists(client: Any, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException:
            return False

    def send_params(self, params: list[Any]) -> None:
        """Record parameters."""
        self._send(lambda: self.client.log_batch(self.run_id, params=params))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._send(lambda: self.client.log_batch(self.run_id, metrics=values))

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._send(lambda: self.client.set_tag(self.run_id, key, value))

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copy a file or a folder into the run's artifacts."""
        path = Path(path)
        upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        self._send(lambda: upload(self.run_id, str(path), folder))

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run, after a last attempt at what is still unsent."""
        self._retry_at = 0.0
        self._send(lambda: self.client.set_terminated(self.run_id, status=status))
        if self._pending:
            logger.warning("MLflow run %s: %d calls were lost", self.run_id, len(self._pending))

    def _send(self, call: Callable[[], Any]) -> None:
        from mlflow.exceptions import MlflowException
        from requests import RequestException

        self._pending.append(call)
        if time.monotonic() < self._retry_at:
            return
        while self._pending:
            try:
                self._pending[0]()
            except (MlflowException, RequestException, OSError) as error:
                if _is_permanent(error):
                    logger.warning("MLflow refuses a call, which is dropped: %s", error)
                    self._pending.pop(0)
                    continue
                self._retry_at = time.monotonic() + RETRY_AFTER_S
                logger.warning(
                    "MLflow cannot be reached (%s); %d calls wait and training goes on",
                    str(error).splitlines()[0],
                    len(self._pending),
                )
                return
            self._pending.pop(0)


def _is_permanent(error: Exception) -> bool:
    """Whether trying again cannot help: a missing file, or a request that the server refuses."""
    if isinstance(error, FileNotFoundError):
        return True
    codes = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
    return getattr(error, "error_code", None) in codes
