"""Runs in MLflow. A tracking server that is lost delays what is logged, it never stops a run."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from streamdit.errors import UserError
from training.config import TrackingConfig
from training.job import flatten
from training.outbox import Call, Outbox
from training.revision import git_revision

logger = logging.getLogger(__name__)

ARTIFACTS = ".artifacts.jsonl"
"""How the file for artifacts ends that could not be sent; all else is in the one without it."""

ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
"""What MLflow says to whoever makes what another client has just made."""

MOST_PARAMS = 100
MOST_METRICS = 1000
"""What MLflow takes in one request."""

MAY_PASS = (401, 404, 408, 429)
"""HTTP refusals of what may be taken later: new credentials, a server back behind its proxy, less
load. Whatever else of 400 to 499 is refused stays refused."""


CREDENTIALS_MAY_PASS = (
    *("ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed"),
    *("SignatureDoesNotMatch", "TokenRefreshRequired"),
)
"""What S3 says of credentials, or of a clock, that may be put right while the run goes on."""

REQUEST_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
SLOW_STORE_BYTES_PER_S = 5_000_000


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


def make_client(config: TrackingConfig) -> Any:
    """MLflow client of a store; that the store answers is not tried."""
    from mlflow import MlflowClient

    # The first failed request tells; what is not sent is kept and tried again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault(REQUEST_TIMEOUT, "10")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=tracking_uri(config))


def connect(config: TrackingConfig) -> tuple[Any, str]:
    """MLflow client and experiment id; makes the embedded store and the experiment if need be.

    Raises:
        UserError: if the store cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(config)
    location = None
    if uri == embedded_uri(config.directory):
        folder = Path(config.directory).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Without it a SQLite store puts artifacts into ./mlruns of the current directory.
        location = (folder / "artifacts").as_uri()
    try:
        client = make_client(config)
        return client, _experiment(client, config.experiment, location)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MLflow store {uri} cannot be used: {reason}; start the server, or correct "
            "tracking.uri or MLFLOW_TRACKING_URI"
        ) from None


def _experiment(client: Any, name: str, location: str | None) -> str:
    """Id of the experiment, which is made unless it is there: another client may be making it."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != ALREADY_EXISTS:
            raise
        return str(client.get_experiment_by_name(name).experiment_id)


class Tracker:
    """One MLflow run. It is written by threads of its own, so the caller never waits for it.

    Artifacts may be large or their store out of reach, so they do not go the way of the figures.

    Args:
        client: MLflow client.
        run_id: the run; None for one that `make` has yet to make.
        outbox: file for what cannot be sent while the server is away, artifacts in another beside
            it; None keeps all in memory.
        make: makes the run once the store can be reached; returns its id.
        on_made: told that id, from whichever thread makes the run.
    """

    def __init__(
        self,
        client: Any,
        run_id: str | None,
        outbox: Path | None = None,
        make: Callable[[], str] | None = None,
        on_made: Callable[[str], None] | None = None,
    ) -> None:
        self.client = client
        self.run_id = run_id
        self._make = make
        self._on_made = on_made if run_id is None else None
        self._making = threading.Lock()
        self._outbox = Outbox(self._send, outbox)
        self._artifacts = Outbox(self._send, outbox.with_suffix(ARTIFACTS) if outbox else None)

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
        outbox: Path | None = None,
        on_made: Callable[[str], None] | None = None,
        may_be_away: bool = False,
        began_ms: int | None = None,
    ) -> Tracker:
        """Open a run, or continue the run `run_id` after a resume.

        Args:
            config: which store.
            run_name: name that people see.
            params: nested parameters; written as dotted names.
            tags: further tags; the git revision is added.
            run_id: run to continue; the store need not be reachable then.
            outbox: file for what cannot be sent while the store is away.
            on_made: told the id of a run that is made later, from whichever thread makes it.
            may_be_away: make a new run later, where the store cannot be reached now.
            began_ms: when a new run began, in milliseconds since 1970; default: now.

        Raises:
            UserError: if there is no run yet and the store cannot be reached.
        """
        if run_id is not None:
            client = make_client(config)
            if not is_gone(client, run_id):
                tracker = cls(client, run_id, outbox)
                tracker._status("RUNNING")
                return tracker
        all_tags, began_ms = _all_tags(tags), began_ms or int(time.time() * 1000)
        make = partial(_make_run, config, run_name, all_tags, began_ms)
        made = None
        try:
            made = make()
        except UserError:
            if not may_be_away:
                raise
        tracker = cls(make_client(config), made, outbox, make, on_made)
        if made is None:
            for key, value in all_tags.items():  # for whoever sends what this process leaves
                tracker.tag(key, value)
            tracker._status("RUNNING")  # behind how an earlier attempt may have ended
        flat = [(key, str(value)[:500]) for key, value in flatten(params or {}).items()]
        for start in range(0, len(flat), MOST_PARAMS):
            tracker._outbox.put({"kind": "params", "values": flat[start : start + MOST_PARAMS]})
        return tracker

    @classmethod
    def take_up(
        cls,
        config: TrackingConfig,
        run_name: str,
        run_id: str | None,
        outbox: Path,
        on_made: Callable[[str], None],
        began_ms: int | None = None,
    ) -> Tracker:
        """Send what a run has left in `outbox`; a run that could not even be made is made now."""
        make = partial(_make_run, config, run_name, {}, began_ms)
        return cls(make_client(config), run_id, outbox, make, on_made)

    def note(self, write: Callable[[str | None], None]) -> None:
        """Call `write` with the run's id, None if it is not made yet; it is not made meanwhile."""
        with self._making:
            write(self.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        now = int(time.time() * 1000)
        values = [[name, float(value), now, step] for name, value in metrics.items()]
        self._outbox.put({"kind": "metrics", "values": values})

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._outbox.put({"kind": "tag", "key": key, "value": value})

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copy a file or a folder into the run's artifacts."""
        self._artifacts.put({"kind": "artifact", "path": str(path), "folder": folder})

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run, after a last attempt at what is still unsent."""
        left = self._outbox.close()
        self._status(status)
        left += self._artifacts.close()
        if left:
            logger.warning(
                "MLflow run %s: %d records could not be sent", self.run_id or "yet to be made", left
            )

    def leave(self) -> int:
        """Stop writing without closing the run, which others still write to.

        Returns:
            Records that could not be sent.
        """
        return self._outbox.close() + self._artifacts.close()

    def _status(self, status: str) -> None:
        # Behind the artifacts: whoever sees that the run has ended finds all that it made.
        self._artifacts.put({"kind": "status", "status": status})

    def _send(self, calls: list[Call]) -> int:
        """Write the oldest calls: one, or as many metrics in a row as one request takes."""
        with self._making:
            if self.run_id is None:
                assert self._make is not None, "a tracker has a run, or makes one"
                self.run_id = self._make()
            if self._on_made is not None:
                self._on_made(self.run_id)
                self._on_made = None
        together = 1
        if calls[0]["kind"] == "metrics":
            together = _metrics_in_a_row(calls)
        try:
            self._write(calls[:together])
        except Exception as error:  # MLflow's, or those of whatever library moves an artifact
            if not _is_permanent(error):
                raise
            logger.warning("MLflow refuses %s, dropped: %s", _describe(calls[:together]), error)
        return together

    def _write(self, calls: list[Call]) -> None:
        from mlflow.entities import Metric, Param

        call = calls[0]
        if call["kind"] == "metrics":
            values = [Metric(*value) for one in calls for value in one["values"]]
            self.client.log_batch(self.run_id, metrics=values)
        elif call["kind"] == "params":
            self.client.log_batch(self.run_id, params=[Param(*pair) for pair in call["values"]])
        elif call["kind"] == "tag":
            self.client.set_tag(self.run_id, call["key"], call["value"])
        elif call["kind"] == "status" and call["status"] == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        elif call["kind"] == "status":
            self.client.set_terminated(self.run_id, status=call["status"])
        else:
            path = Path(call["path"])
            upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            with _patient_for(path):
                upload(self.run_id, str(path), call["folder"])


@contextmanager
def _patient_for(path: Path) -> Iterator[None]:
    """Let MLflow wait for the answer to an upload of `path`.

    A server that hands artifacts on to a store answers when that has the whole file. (MLflow reads
    the time from the environment at every request.)
    """
    largest = max((file.stat().st_size for file in path.rglob("*") if file.is_file()), default=0)
    if path.is_file():
        largest = path.stat().st_size
    before = os.environ.get(REQUEST_TIMEOUT, "10")
    os.environ[REQUEST_TIMEOUT] = str(int(before) + largest // SLOW_STORE_BYTES_PER_S)
    try:
        yield
    finally:
        os.environ[REQUEST_TIMEOUT] = before


def _make_run(
    config: TrackingConfig,
    name: str,
    tags: dict[str, str],
    began_ms: int | None,
) -> str:
    """A new run that began at `began_ms`; returns its id.

    Raises:
        UserError: if the store cannot be reached, or takes no run.
    """
    from mlflow.exceptions import MlflowException

    client, experiment_id = connect(config)
    try:
        run = client.create_run(experiment_id, start_time=began_ms, run_name=name, tags=tags)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MLflow store {tracking_uri(config)} takes no run: {reason}; see the server's log"
        ) from None
    return str(run.info.run_id)


def _all_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    """Tags of a run, with the git revision."""
    revision = git_revision()
    return {**(tags or {}), **({"mlflow.source.git.commit": revision} if revision else {})}


def _metrics_in_a_row(calls: list[Call]) -> int:
    """How many calls from the first on are metrics that fit into one request."""
    count = size = 0
    for call in calls:
        size += len(call.get("values", ()))
        if call["kind"] != "metrics" or (count and size > MOST_METRICS):
            break
        count += 1
    return count


def is_gone(client: Any, run_id: str) -> bool:
    """Whether the store says that there is no such run (any more)."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage != "active")
    except MlflowException as error:
        return error.error_code == "RESOURCE_DOES_NOT_EXIST"


def _is_permanent(error: Exception) -> bool:
    """Whether trying again cannot help: a missing file, or a request that the server refuses."""
    if isinstance(error, FileNotFoundError):
        return True
    if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
        return True
    status = _http_status(error)
    return status is not None and 400 <= status < 500 and status not in MAY_PASS


def _http_status(error: BaseException | None) -> int | None:
    """What a server answered, as the libraries of MLflow, HTTP and S3 say it."""
    from mlflow.exceptions import MlflowException

    while error is not None:
        if isinstance(error, MlflowException):
            return int(error.get_http_status_code())
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore's
            if response.get("Error", {}).get("Code") in CREDENTIALS_MAY_PASS:
                return MAY_PASS[0]
            return int(response["ResponseMetadata"]["HTTPStatusCode"])
        if response is not None:
            return int(response.status_code)
        error = error.__cause__ or error.__context__
    return None


def _describe(calls: list[Call]) -> str:
    """Records by what a person knows them as."""
    first = calls[0]
    if first["kind"] == "metrics":
        steps = sorted({value[3] for call in calls for value in call["values"]})
        return f"the metrics of steps {steps[0]} to {steps[-1]}" if steps else "metrics"
    if first["kind"] == "params":
        return f"parameters from {first['values'][0][0]} on"
    names = {"artifact": "path", "tag": "key", "status": "status"}
    return f"{first['kind']} {first[names[first['kind']]]}"
