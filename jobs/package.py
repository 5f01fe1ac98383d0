"""The folder that a cluster job runs in, packed: code and configuration, never data."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from jobs.console import format_bytes
from streamdit.errors import UserError

LIMIT_BYTES = 100_000_000
"""Largest package, unpacked. Ray's job server takes uploads of 100 MiB, and every node of the
cluster fetches them again; what is larger is data, and belongs on shared storage."""

ALWAYS_EXCLUDED = (
    # version control, environments, caches
    *(".git/", ".venv/", "venv/", "node_modules/", "__pycache__/", ".*_cache/", "*.egg-info/"),
    # what the commands write by default
    *("/runs/", "/data/", "mlruns/", "/build/", "/dist/", "/site/", ".writing.json", "*.partial"),
    # video, datasets and weights
    *("*.mp4", "*.mkv", "*.mov", "*.webm", "*.avi", "*.parquet", "*.safetensors", "*.pt"),
    # settings that hold secrets
    *(".env", ".env.*", ".netrc", "*.pem", "*.key"),
)
"""Left out of every package, in the language of `.gitignore`."""

IGNORE_FILES = (".gitignore", ".rayignore")
LARGEST_SHOWN = 3


@dataclass(frozen=True)
class Package:
    """Files that a job takes along.

    Attributes:
        root: folder that they are packed from, and named relative to.
        files: their paths below it, sorted.
        size: bytes, unpacked.
    """

    root: Path
    files: tuple[Path, ...]
    size: int

    def write(self, target: Path) -> Path:
        """Write the package as a zip file, whose bytes depend on the files' contents only."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in self.files:
                # A fixed date: Ray knows packages by their bytes, and sends a known one only once.
                entry = zipfile.ZipInfo(file.as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
                mode = 0o755 if os.access(self.root / file, os.X_OK) else 0o644
                entry.external_attr = mode << 16
                archive.writestr(
                    entry, (self.root / file).read_bytes(), compress_type=zipfile.ZIP_DEFLATED
                )
        return target


def collect(root: Path, exclude: Sequence[str] = (), limit: int = LIMIT_BYTES) -> Package:
    """Choose the files of `root` that a job takes along.

    Args:
        root: folder to pack.
        exclude: patterns left out besides `ALWAYS_EXCLUDED` and those of the folder's own
            `.gitignore` and `.rayignore`, in the language of `.gitignore`.
        limit: largest sum of file sizes, in bytes.

    Raises:
        UserError: if `root` is no folder, or holds more than `limit`.
    """
    if not root.is_dir():
        raise UserError(f"working directory {root} is no folder: name one with --working-dir")
    root = root.resolve()
    patterns = [*ALWAYS_EXCLUDED, *_ignore_patterns(root), *exclude]
    sizes: dict[Path, int] = {}
    total = 0
    for file in _walk(root, GitIgnoreSpec.from_lines(patterns)):
        sizes[file] = (root / file).stat().st_size
        total += sizes[file]
        if total > limit:
            raise UserError(_too_large(root, sizes, limit))
    return Package(root, tuple(sorted(sizes)), total)


def _ignore_patterns(root: Path) -> Iterator[str]:
    for name in IGNORE_FILES:
        if (root / name).is_file():
            yield from (root / name).read_text().splitlines()


def _walk(root: Path, excluded: GitIgnoreSpec) -> Iterator[Path]:
    """Files below `root` that are not excluded, relative to it; excluded folders stay unread."""
    for parent, folders, files in os.walk(root):
        here = Path(parent).relative_to(root)
        folders[:] = sorted(
            name for name in folders if not excluded.match_file(f"{(here / name).as_posix()}/")
        )
        for name in sorted(files):
            file = here / name
            if not excluded.match_file(file.as_posix()) and (root / file).is_file():
                yield file


def _too_large(root: Path, sizes: dict[Path, int], limit: int) -> str:
    by_entry: Counter[str] = Counter()
    for file, size in sizes.items():
        by_entry[file.parts[0] + ("/" if len(file.parts) > 1 else "")] += size
    largest = ", ".join(
        f"{name} {format_bytes(size)}" for name, size in by_entry.most_common(LARGEST_SHOWN)
    )
    return (
        f"working directory {root} holds more than {format_bytes(limit)}, which is too much to "
        f"send with a job (largest so far: {largest}): leave data out with --exclude PATTERN and "
        "put it on storage that the cluster reads, or name a smaller folder with --working-dir"
    )
