"""Finding videos: files, folders, text lists of them, and S3 prefixes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.child import describe_error
from pipeline.storage import is_s3, read_span, s3_client, split_s3
from streamdit.errors import UserError

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"),
    *(".flv", ".wmv", ".3gp", ".ogv", ".y4m"),
)
SIDECAR_SUFFIXES = (".vtt", ".json", ".txt")
PARTIAL_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".tmp", ".temp", ".aria2")
HASHED_BYTES = 1 << 20
HASHING_THREADS = 8


@dataclass(frozen=True)
class Source:
    """One video, known by its content."""

    source_id: str
    """Hash of its size, first and last megabyte; 16 hexadecimal digits."""
    uri: str
    """Absolute path or `s3://` address."""
    size: int
    """Bytes."""
    sidecars: tuple[str, ...] = ()
    """Caption files beside it, in the order of preference."""


@dataclass
class Listing:
    """What a listing found, and what it left out."""

    sources: list[Source] = field(default_factory=list)
    """Sorted by id; of files with the same content, the one whose address sorts first."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason (`hidden`, `partial`, `not video`, `duplicate`) to number of files."""
    dead: list[tuple[str, str, str, bool]] = field(default_factory=list)
    """Files that cannot be read: address, error class, message, whether to try again."""

    def skip(self, reason: str) -> None:
        """Count one file left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


@dataclass(frozen=True)
class Entry:
    """A file of a folder or prefix."""

    uri: str
    size: int


def list_sources(inputs: Sequence[str]) -> Listing:
    """Find and identify the videos that `inputs` name.

    Args:
        inputs: each a video file, a folder (searched below), a text file (suffix `.txt` or
            `.list`) that names one of these per line, or `s3://bucket/prefix`.

    Raises:
        UserError: if an input does not exist or no input names a video.
    """
    listing = Listing()
    entries: dict[str, Entry] = {}
    sidecars: dict[str, set[str]] = {}
    for entry in _expand(inputs):
        if (reason := _why_skipped(entry.uri)) is None:
            entries[entry.uri] = entry
        elif reason == "sidecar":
            stem, suffix = os.path.splitext(entry.uri)
            sidecars.setdefault(stem, set()).add(suffix)
        else:
            listing.skip(reason)
    if not entries:
        raise UserError(
            f"no video found in {', '.join(inputs)}: give files, folders or s3:// prefixes that "
            f"hold {', '.join(VIDEO_SUFFIXES[:4])} ... files"
        )
    _identify(sorted(entries.values(), key=lambda e: e.uri), sidecars, listing)
    return listing


def _identify(entries: list[Entry], sidecars: dict[str, set[str]], listing: Listing) -> None:
    """Hash each entry into `listing`."""
    found: dict[str, Source] = {}
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for entry, result in zip(entries, pool.map(_try_content_id, entries), strict=True):
            if isinstance(result, Exception):
                listing.dead.append((entry.uri, *describe_error(result)))
            elif result in found:
                listing.skip("duplicate")
            else:
                stem = os.path.splitext(entry.uri)[0]
                beside = sidecars.get(stem, set())
                names = tuple(stem + suffix for suffix in SIDECAR_SUFFIXES if suffix in beside)
                found[result] = Source(result, entry.uri, entry.size, names)
    listing.sources = [found[source_id] for source_id in sorted(found)]


class EmptyFileError(ValueError):
    """A file without content."""


def _try_content_id(entry: Entry) -> str | Exception:
    """The content id, or the error that reading raised (it becomes a dead letter)."""
    try:
        if entry.size == 0:
            raise EmptyFileError("the file is empty")
        return content_id(entry.uri, entry.size)
    except Exception as error:  # any store has its own errors; each is recorded with its file
        return error


def content_id(uri: str, size: int) -> str:
    """Identity of a file's content: SHA-256 over its size, first and last megabyte, shortened."""
    digest = hashlib.sha256(str(size).encode())
    digest.update(read_span(uri, 0, HASHED_BYTES))
    if size > HASHED_BYTES:
        start = max(HASHED_BYTES, size - HASHED_BYTES)
        digest.update(read_span(uri, start, size - start))
    return digest.hexdigest()[:16]


def _why_skipped(uri: str) -> str | None:
    """Why a file is no source; none if it is one."""
    name = uri.rsplit("/", 1)[-1]
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        return "hidden"
    if suffix in PARTIAL_SUFFIXES or name.endswith("~"):
        return "partial"
    if suffix in VIDEO_SUFFIXES:
        return None
    return "sidecar" if os.path.splitext(name)[1] in SIDECAR_SUFFIXES else "not video"


def _expand(inputs: Iterable[str]) -> Iterator[Entry]:
    """Files that `inputs` stand for; a single file brings the sidecars beside it."""
    for name in inputs:
        if is_s3(name):
            yield from _list_prefix(name)
            continue
        path = Path(name).expanduser().absolute()
        if path.is_dir():
            yield from _list_folder(path)
        elif not path.exists():
            raise UserError(f"input {name} does not exist: check the path")
        elif path.suffix.lower() in (".txt", ".list"):
            yield from _expand(_read_list(path))
        else:
            yield Entry(str(path), path.stat().st_size)
            for beside in (path.with_suffix(suffix) for suffix in SIDECAR_SUFFIXES):
                if beside.exists():
                    yield Entry(str(beside), beside.stat().st_size)


def _read_list(path: Path) -> list[str]:
    """Names in a list file; relative ones are relative to the list, `#` starts a comment."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    if any(Path(name).suffix.lower() in (".txt", ".list") for name in names):
        raise UserError(f"list {path} names another list: name videos, folders or s3:// prefixes")
    return [name if is_s3(name) else str(path.parent / Path(name).expanduser()) for name in names]


def _list_folder(folder: Path) -> Iterator[Entry]:
    """Files below `folder`, hidden folders left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(parent, name)
            # A link whose target is gone has no size; reading it will say so.
            yield Entry(path, os.path.getsize(path) if os.path.exists(path) else -1)


def _list_prefix(uri: str) -> Iterator[Entry]:
    """Objects under an `s3://` prefix."""
    import botocore.exceptions

    bucket, prefix = split_s3(uri)
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    try:
        for page in pages:
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):
                    yield Entry(f"s3://{bucket}/{item['Key']}", int(item["Size"]))
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"input {uri} cannot be listed ({reason}): check the bucket, and endpoint, region and "
            "credentials in the environment"
        ) from None
