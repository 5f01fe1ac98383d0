"""Services that this project works with: probes that each return findings, and change nothing."""

from __future__ import annotations

import importlib
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from jobs.findings import Finding

DEFAULT_PORTS = {"": 6379, "ray": 10001, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Port of an address that gives none, by its scheme (none: a Ray cluster's head)."""

CONNECT_TIMEOUT_S = 3.0


def deepspeed() -> Iterator[Finding]:
    """Whether DeepSpeed starts, and with which accelerator and backend."""
    try:
        accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
        name, backend = accelerator.device_name(), accelerator.communication_backend_name()
    except Exception as error:  # DeepSpeed checks its toolchain here and raises as it likes.
        yield Finding(
            "services",
            "DeepSpeed",
            "missing",
            f"fails to start: {type(error).__name__}: {error}",
            "on a machine without GPU set DS_ACCELERATOR=cpu; else match torch and deepspeed",
        )
        return
    yield Finding("services", "DeepSpeed", "ok", f"accelerator {name}, backend {backend}")


def ray() -> Iterator[Finding]:
    """The Ray cluster that is named, if any."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "local":
        text = "no cluster named: every command starts Ray on this machine"
        yield Finding("services", "Ray", "ok", text)
        return
    if address == "auto":
        started = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").exists()
        yield Finding(
            "services",
            "Ray",
            "ok" if started else "missing",
            "RAY_ADDRESS=auto" + ("" if started else ", but no cluster runs on this machine"),
            "" if started else "ray start --head, or unset RAY_ADDRESS",
        )
        return
    problem = _connection_problem(address)
    yield Finding(
        "services",
        "Ray",
        "missing" if problem else "ok",
        f"RAY_ADDRESS={without_secrets(address)} " + (problem or "is reachable"),
        "start the cluster, correct RAY_ADDRESS, or unset it" if problem else "",
    )


def mlflow() -> Iterator[Finding]:
    """Where runs are recorded."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        yield _embedded_mlflow()
        return
    shown = f"MLFLOW_TRACKING_URI={without_secrets(uri)}"
    if uri.startswith(("http://", "https://")):
        problem = _http_problem(uri.rstrip("/") + "/health")
        remedy = "start the server, correct MLFLOW_TRACKING_URI, or unset it"
    elif uri.startswith(("sqlite:", "file:")) or "://" not in uri:
        problem = _folder_problem(_local_store(uri))
        remedy = "create the folder, make it writable, or unset MLFLOW_TRACKING_URI"
    elif uri.partition("+")[0].partition(":")[0] not in DEFAULT_PORTS:
        yield Finding("services", "MLflow", "ok", f"{shown}, not examined")
        return
    else:
        problem = _connection_problem(uri)
        remedy = "start the database, correct MLFLOW_TRACKING_URI, or unset it"
    yield Finding(
        "services",
        "MLflow",
        "missing" if problem else "ok",
        f"{shown} {problem or 'is usable'}",
        remedy if problem else "",
    )


def _embedded_mlflow() -> Finding:
    """The store that runs are recorded in where no server is named."""
    from training.config import TrackingConfig

    folder = Path.cwd() / TrackingConfig().directory
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if problem := _folder_problem(existing):
        remedy = "work in a folder that you may write to, or set MLFLOW_TRACKING_URI"
        return Finding("services", "MLflow", "missing", f"embedded store {problem}", remedy)
    text = f"embedded store in {TrackingConfig().directory}, or in the folder of the run"
    return Finding("services", "MLflow", "ok", text)


def _local_store(uri: str) -> Path:
    """Folder that a local store is written in."""
    if uri.startswith("sqlite:"):
        return (Path.cwd() / uri.removeprefix("sqlite:").removeprefix("///")).parent
    return Path(urlsplit(uri).path if uri.startswith("file:") else uri)


def _folder_problem(folder: Path) -> str:
    if not folder.is_dir():
        return f"cannot be used: {folder} is no folder"
    return "" if os.access(folder, os.W_OK) else f"cannot be used: {folder} is not writable"


def s3() -> Iterator[Finding]:
    """Which S3 settings are present; never their secret values."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
    settings = [f"{n}={without_secrets(os.environ[n])}" for n in names if os.environ.get(n)]
    credentials = _credentials_source()
    if not settings and not credentials:
        yield Finding("services", "S3", "ok", "no settings: local files only")
        return
    yield Finding(
        "services",
        "S3",
        "ok" if credentials else "warning",
        "; ".join([*settings, f"credentials from {credentials or 'nowhere'}"]),
        "" if credentials else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    )


def _credentials_source() -> str:
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return "the environment"
    if os.environ.get("AWS_PROFILE"):
        return f"profile {os.environ['AWS_PROFILE']}"
    if os.environ.get("AWS_ROLE_ARN") or os.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        return "a role"
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    return str(file) if file.is_file() else ""


def without_secrets(address: str) -> str:
    """`address` without user, password and query, which may hold credentials."""
    parts = urlsplit(address)
    if not parts.netloc:
        return address
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _connection_problem(address: str) -> str:
    """Why `host:port` or a URL cannot be connected to; empty if it can."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        scheme = parts.scheme.partition("+")[0]
        host, port = parts.hostname, parts.port or DEFAULT_PORTS.get(scheme, 80)
    except ValueError as error:
        return f"is no address ({error})"
    if not host:
        return "names no host"
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"does not answer ({error})"
    return ""


def _http_problem(url: str) -> str:
    """Why a server's health page cannot be read; empty if it can, or asks who one is."""
    try:
        urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return "" if error.code in (401, 403) else f"answers with HTTP status {error.code}"
    except (OSError, ValueError) as error:
        return f"does not answer ({getattr(error, 'reason', error)})"
    return ""
