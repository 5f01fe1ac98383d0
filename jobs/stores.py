"""The MLflow store of a submitted job: one that the cluster reaches, and that outlives the job."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from urllib.parse import urlsplit

from jobs.console import say
from streamdit.errors import UserError

VARIABLE = "MLFLOW_TRACKING_URI"


def check_store(name: str, uri: str) -> None:
    """Refuse a store that is another one on the cluster than here, or none.

    Raises:
        UserError: for files of this machine and servers that only it reaches.
    """
    parts = urlsplit(uri)
    if parts.scheme == "sqlite" or uri.startswith("file:"):
        raise _unreachable(name, uri, "a file of this machine")
    if not parts.scheme and not uri.startswith("databricks"):
        raise _unreachable(name, uri, "a folder of this machine")
    check_server(name, uri)


def check_server(name: str, uri: str) -> None:
    """Refuse a server that only this machine reaches; files may be on storage that all share.

    Raises:
        UserError: for an address of this machine alone.
    """
    host = urlsplit(uri).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback:
        raise _unreachable(name, uri, "an address of this machine alone")


def _unreachable(name: str, uri: str, place: str) -> UserError:
    return UserError(
        f"{name} {uri} is {place}: the job would record where nobody looks; name a server that "
        f"the cluster's nodes reach, as in --env {VARIABLE}=http://HOST:5000"
    )


def store_of_model(model: Path) -> list[str]:
    """Words that make `register` use the store in which the model's training is recorded.

    Where the run's record cannot be read from here, that is the store beside the run, and a line
    says so.
    """
    from training.records import RUN_FILE  # here: other commands need no trainer

    record = model.parent / RUN_FILE
    known = json.loads(record.read_text()).get("tracking_uri") if record.is_file() else None
    if known:
        return ["--tracking-uri", known]
    store = model.parent.parent / "mlflow"
    say(f"registers in {store} unless the cluster names a server; --tracking-dir names another")
    return ["--tracking-dir", str(store)]
