"""What a machine offers to this project: probes that each return findings, and change nothing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from jobs.console import format_bytes

Status = Literal["ok", "warning", "missing"]

INTERCHANGEABLE = {
    "opencv-python-headless": "opencv-python",
    "scenedetect": "scenedetect-headless",
    "scenedetect-headless": "scenedetect",
}
"""Packages that bring the same module as another one; either serves."""

DEFAULT_PORTS = {"": 6379, "ray": 10001, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Port of an address that gives none, by its scheme (none: a Ray cluster's head)."""

CONNECT_TIMEOUT_S = 3.0
FREE_DISK_WARNING = 20e9
FREE_DISK_REQUIRED = 2e9
SHARED_MEMORY_WARNING = 2e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` means that the project cannot work without it."""

    section: str
    name: str
    status: Status
    found: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Everything there is to know, in reading order."""
    probes: tuple[Callable[[], Iterator[Finding]], ...] = (
        _system,
        _devices,
        _storage,
        _libraries,
        _codecs,
        _deepspeed,
        _ray,
        _mlflow,
        _s3,
    )
    for probe in probes:
        name = probe.__name__.lstrip("_")
        try:
            yield from probe()
        except ImportError as error:
            text = f"cannot be examined: {error}"
            yield Finding("machine", name, "missing", text, "install the libraries listed below")


def _system() -> Iterator[Finding]:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        "machine",
        "Python",
        "ok" if fits else "missing",
        version,
        "" if fits else "use Python 3.11, 3.12 or 3.13: make setup PYTHON=python3.12",
    )
    yield Finding("machine", "system", "ok", f"{platform.system()} {platform.release()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "CPU cores", "ok", f"{usable} usable ({platform.machine()})")
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.total >= 6e9
    yield Finding(
        "machine",
        "memory",
        "ok" if enough else "warning",
        f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free",
        "" if enough else "the demo needs about 6 GB; close other programs or use a larger machine",
    )


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        driver = _nvidia_driver()
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Finding(
                "machine",
                f"GPU {index}",
                "ok",
                f"{device.name}, {format_bytes(device.total_memory)}, compute capability "
                f"{device.major}.{device.minor}, driver {driver}, CUDA {torch.version.cuda}",
            )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "machine",
            "GPU",
            "warning",
            f"CPU only: driver {_nvidia_driver()} is there, but PyTorch (CUDA "
            f"{torch.version.cuda}) cannot use it",
            "install a driver for that CUDA version, or the PyTorch build for this driver",
        )
    else:
        yield Finding(
            "machine",
            "GPU",
            "warning",
            "none: everything runs on the CPU",
            "the demo is made for this; real models need CUDA GPUs",
        )


def _nvidia_driver() -> str:
    """Version of the NVIDIA driver, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return output.stdout.split("\n")[0].strip() or "unknown"


def _storage() -> Iterator[Finding]:
    yield _disk("disk, here", Path.cwd(), "free space, or work on a larger disk")
    ray_folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    yield _disk("disk, Ray", ray_folder, "free space there, or set RAY_TMPDIR to a larger disk")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        enough = free >= SHARED_MEMORY_WARNING
        yield Finding(
            "storage",
            "shared memory",
            "ok" if enough else "warning",
            f"{format_bytes(free)} free",
            ""
            if enough
            else "Ray and data loaders need it: start the container with --shm-size=8g",
        )


def _disk(name: str, folder: Path, remedy: str) -> Finding:
    if not folder.is_dir():
        return Finding("storage", name, "missing", f"{folder} is no folder", remedy)
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    if free < FREE_DISK_REQUIRED or not writable:
        status: Status = "missing"
    else:
        status = "ok" if free >= FREE_DISK_WARNING else "warning"
    text = f"{format_bytes(free)} free in {folder}{'' if writable else ', not writable'}"
    return Finding("storage", name, status, text, "" if status == "ok" else remedy)


def _libraries() -> Iterator[Finding]:
    """The installed version of every library that the project declares."""
    from packaging.requirements import Requirement

    for line in _declared_requirements():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = str(requirement.specifier)
        remedy = f'pip install "{requirement.name}{wanted}"'
        version = _installed_version(requirement.name)
        if version is None:
            yield Finding("libraries", requirement.name, "missing", "not installed", remedy)
        elif requirement.specifier.contains(version, prereleases=True):
            yield Finding("libraries", requirement.name, "ok", version)
        else:
            text = f"{version}, outside {wanted}"
            yield Finding("libraries", requirement.name, "warning", text, remedy)


def _installed_version(name: str) -> str | None:
    """Version of a package, or of one that brings the same module; None without either."""
    for candidate in (name, INTERCHANGEABLE.get(name)):
        try:
            return metadata.version(candidate) if candidate else None
        except metadata.PackageNotFoundError:
            continue
    return None


def _declared_requirements() -> list[str]:
    """Requirements of the installed project, or of the checkout that this file is in."""
    try:
        return metadata.requires("streamdit") or []
    except metadata.PackageNotFoundError:
        import tomllib

        pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(pyproject.read_text())["project"]["dependencies"]


def _codecs() -> Iterator[Finding]:
    try:
        import av
        from av.codec.codec import UnknownCodecError
    except ImportError as error:
        yield Finding("video", "PyAV", "missing", f"cannot be imported: {error}", "pip install av")
        return

    def usable(name: str, mode: Literal["r", "w"]) -> bool:
        try:
            av.codec.Codec(name, mode)
        except UnknownCodecError:
            return False
        return True

    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    decoders = {name: usable(name, "r") for name in ("h264", "hevc", "vp9", "av1")}
    lacking = [name for name, there in decoders.items() if not there]
    yield Finding(
        "video",
        "PyAV decoders",
        "missing" if "h264" in lacking else "warning" if lacking else "ok",
        f"{', '.join(name for name, there in decoders.items() if there)} (libavcodec {ffmpeg})"
        + (f"; without {', '.join(lacking)}" if lacking else ""),
        "install PyAV from its wheel: pip install --force-reinstall --only-binary :all: av"
        if lacking
        else "",
    )
    encoder = usable("libx264", "w")
    yield Finding(
        "video",
        "H.264 encoder",
        "ok" if encoder else "missing",
        "libx264" if encoder else "none",
        "" if encoder else "install PyAV from its wheel, which has libx264",
    )
    yield _decord()


def _decord() -> Finding:
    try:
        version = importlib.import_module("decord").__version__
    except (ImportError, OSError) as error:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            text = "not made for this system; PyAV reads sparse frames instead"
            return Finding("video", "decord", "ok", text)
        text = f"cannot be imported: {error}"
        return Finding("video", "decord", "missing", text, "pip install decord")
    return Finding("video", "decord", "ok", version)


def _deepspeed() -> Iterator[Finding]:
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


def _ray() -> Iterator[Finding]:
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


def _mlflow() -> Iterator[Finding]:
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


def _s3() -> Iterator[Finding]:
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
