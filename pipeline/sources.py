"""The videos that inputs name, each known by its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.catalogue import Catalogue, Entry, Source, Sources, disk_errors
from pipeline.child import describe_error
from pipeline.listing import SIDECAR_SUFFIXES, VIDEO_SUFFIXES, find_files
from pipeline.storage import file_size, is_s3, read_span
from pipeline.threads import map_in_order
from streamdit.errors import UserError

HASHED_BYTES = 1 << 20
HASHING_THREADS = 8


@dataclass
class Listing:
    """What a listing found, and what it left out."""

    sources: Sources = field(default_factory=Sources)
    """Of files with the same content, the one whose address sorts first."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason (`hidden`, `partial`, `not video`, `duplicate`) to number of files."""
    dead: list[tuple[str, str, str, bool]] = field(default_factory=list)
    """Files that cannot be read: address, error class, message, whether to try again."""
    opened: set[str] = field(default_factory=set)
    """Archives, tables and folders in lists, those too that cannot be read."""
    catalogue: Catalogue = field(default_factory=Catalogue)
    """Every video that was found, readable or not, duplicates too."""

    def has_seen(self, uri: str) -> bool:
        """Whether this listing found the file, whatever became of it."""
        return uri in self.opened or self.catalogue.has_video(uri)


def list_sources(inputs: Sequence[str]) -> Listing:
    """Find and identify the videos that `inputs` name.

    A file is a video by its suffix, or by its first bytes if the suffix says nothing.

    Args:
        inputs: each a video file; a folder or `s3://bucket/prefix` (searched below, with what
            `metadata.csv`, `.jsonl` or `.parquet` in it say, and `.tar` archives of WebDataset); a
            text file (suffix `.txt` or `.list`) that names such things per line; or a table
            (`.csv`, `.tsv`, `.jsonl`, `.parquet`, see :mod:`pipeline.manifests`).

    Raises:
        UserError: if an input does not exist, a table is not understood, or no input names a video.
    """
    with disk_errors():
        found = find_files(inputs)
        listing = Listing(
            skipped=found.skipped,
            dead=[(_shown(uri), *describe_error(error)) for uri, error in found.unreadable],
            opened=found.opened | {uri for uri, _ in found.unreadable},
            catalogue=found.catalogue,
        )
        _identify(listing)
    if not (listing.sources or listing.dead):
        raise UserError(
            f"no video found in {', '.join(inputs)}: give files, folders or s3:// prefixes that "
            f"hold {', '.join(VIDEO_SUFFIXES[:4])} ... files"
        )
    listing.dead.sort()
    return listing


def _identify(listing: Listing) -> None:
    """Hash every video of the catalogue."""
    entries = listing.catalogue.videos()
    for entry, result in map_in_order(_try_content_id, entries, HASHING_THREADS):
        if isinstance(result, Exception):
            listing.dead.append((_shown(entry.uri), *describe_error(result)))
        elif not listing.sources.add(_source(entry, *result, listing.catalogue)):
            listing.skipped["duplicate"] = listing.skipped.get("duplicate", 0) + 1


def _source(entry: Entry, source_id: str, size: int, catalogue: Catalogue) -> Source:
    """A source with all that is known about it; tables come before files beside it."""
    note = catalogue.note_on(entry.uri) + entry.note
    beside = catalogue.captions_beside(entry.uri)
    stem = os.path.splitext(entry.uri)[0]
    files = tuple(stem + suffix for suffix in SIDECAR_SUFFIXES if suffix in beside)
    return Source(
        source_id=source_id,
        uri=entry.uri,
        size=size,
        sidecars=(*note.sidecars(), *entry.sidecars, *files),
        licence=note.licence,
        attribution=note.attribution,
    )


def _shown(uri: str) -> str:
    """An address as text, which file names need not be."""
    return uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class FileNameError(ValueError):
    """A file name that is not UTF-8, which tables cannot hold."""


class EmptyFileError(ValueError):
    """A file without content."""


class AddressError(ValueError):
    """An address that names no file and no S3 object."""


def _try_content_id(entry: Entry) -> tuple[Entry, tuple[str, int] | Exception]:
    """Content id and size, or the error that reading raised (it becomes a dead letter)."""
    try:
        if "://" in entry.uri and not is_s3(entry.uri):
            raise AddressError("only files and s3:// objects can be read: download it first")
        if _shown(entry.uri) != entry.uri:
            raise FileNameError("the name of the file or of a folder is not UTF-8: rename it")
        size = file_size(entry.uri) if entry.size is None else entry.size
        if size == 0:
            raise EmptyFileError("the file is empty")
        return entry, (content_id(entry.uri, size), size)
    except Exception as error:  # any store has its own errors; each is recorded with its file
        return entry, error


def content_id(uri: str, size: int) -> str:
    """Identity of a file's content: SHA-256 over its size, first and last megabyte, shortened."""
    digest = hashlib.sha256(str(size).encode())
    digest.update(read_span(uri, 0, HASHED_BYTES))
    if size > HASHED_BYTES:
        start = max(HASHED_BYTES, size - HASHED_BYTES)
        digest.update(read_span(uri, start, size - start))
    return digest.hexdigest()[:16]
