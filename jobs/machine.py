"""What a machine offers to this project: probes that each return findings, and change nothing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from jobs import services
from jobs.console import format_bytes
from jobs.findings import Finding, Status

INTERCHANGEABLE = {
    "opencv-python-headless": "opencv-python",
    "scenedetect": "scenedetect-headless",
    "scenedetect-headless": "scenedetect",
}
"""Packages that bring the same module as another one; either serves."""

FREE_DISK_WARNING = 20e9
FREE_DISK_REQUIRED = 2e9
SHARED_MEMORY_WARNING = 2e9


def examine() -> Iterator[Finding]:
    """Everything there is to know, in reading order."""
    probes: tuple[Callable[[], Iterator[Finding]], ...] = (
        _system,
        _devices,
        _storage,
        _libraries,
        _codecs,
        services.deepspeed,
        services.ray,
        services.mlflow,
        services.s3,
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
