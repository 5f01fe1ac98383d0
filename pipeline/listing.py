"""Walking inputs: folders, lists and tables of videos, WebDataset archives, S3 prefixes."""

from __future__ import annotations

import json
import mimetypes
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.archives import (
    ARCHIVE_SUFFIX,
    COMPRESSED_SUFFIXES,
    CompressedArchiveError,
    Member,
    list_members,
)
from pipeline.catalogue import NOTHING, Catalogue, Entry
from pipeline.manifests import (
    FOLDER_MANIFESTS,
    ManifestError,
    Note,
    is_manifest,
    read_manifest,
    resolve,
)
from pipeline.signatures import SIGNATURE_BYTES, looks_like_video
from pipeline.storage import (
    MissingObjectError,
    S3Object,
    StorageError,
    file_size,
    is_s3,
    list_objects,
    open_binary,
    read_bytes,
    read_span,
    split_s3,
)
from pipeline.threads import map_in_order
from streamdit.errors import UserError

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"),
    *(".flv", ".wmv", ".3gp", ".ogv", ".y4m"),
)
SIDECAR_SUFFIXES = (".vtt", ".json", ".txt")
LIST_SUFFIXES = (".txt", ".list")
PARTIAL_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".tmp", ".temp", ".aria2")
LOOKING_THREADS = 8


@dataclass
class Found:
    """Files by what they are, before any video is opened."""

    catalogue: Catalogue = field(default_factory=Catalogue)
    """Videos, and what lies beside them or is told about them."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason to number of files left out."""
    unreadable: list[tuple[str, Exception]] = field(default_factory=list)
    """Archives, tables and folders that cannot be read, or not to their end."""
    opened: set[str] = field(default_factory=set)
    """Archives and tables that were read, and folders that lists and tables name."""

    def skip(self, reason: str) -> None:
        """Count one file left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def find_files(inputs: Sequence[str]) -> Found:
    """Every file that `inputs` stand for, sorted by what it is.

    Raises:
        UserError: if an input does not exist or cannot be listed, or a table is not understood.
    """
    found = Found()
    for entry in _expand(inputs, found):
        _sort_in(entry, found)
    _look_inside(found)
    return found


def _sort_in(entry: Entry, found: Found) -> None:
    """Put a file where it belongs."""
    kind = _kind(entry.uri)
    if kind == "video":
        found.catalogue.add_video(entry)
    elif kind == "unknown":
        found.catalogue.add_unknown(entry)
    elif kind == "sidecar":
        found.catalogue.add_captions(entry.uri)
    elif kind == "table":
        try:
            _read_table(entry.uri, found.catalogue, names=False)
            found.opened.add(entry.uri)
        except ManifestError as error:
            found.unreadable.append((entry.uri, error))
    elif kind == "archive":
        try:
            for member in _list_archive(entry.uri):
                _sort_in(member, found)
            found.opened.add(entry.uri)
        except (OSError, tarfile.TarError, CompressedArchiveError) as error:
            found.unreadable.append((entry.uri, error))
    else:
        found.skip(kind)


def _read_table(uri: str, catalogue: Catalogue, names: bool) -> None:
    """Note what a table says, and with `names` which videos it names.

    Raises:
        ManifestError: if it cannot be read; then nothing of it is noted.
    """
    with catalogue.all_or_nothing():
        for address, note in read_manifest(uri):
            catalogue.add_note(address, note)
            if names:
                catalogue.add_name(address)


def _kind(uri: str) -> str:
    """What a file is by its name: one of the cases of :func:`_sort_in`, or why it is left out."""
    name = uri.rsplit("/", 1)[-1].rsplit("#", 1)[-1]
    stem, suffix = os.path.splitext(name)
    if name.startswith("."):
        return "hidden"
    if suffix.lower() in PARTIAL_SUFFIXES or name.endswith("~"):
        return "partial"
    if suffix.lower() in VIDEO_SUFFIXES:
        return "video"
    if suffix in SIDECAR_SUFFIXES:
        return "sidecar"
    if name.lower() in FOLDER_MANIFESTS:
        return "table"
    if name.lower().endswith((ARCHIVE_SUFFIX, *COMPRESSED_SUFFIXES)):
        return "archive"
    return "not video" if mimetypes.guess_type(stem + suffix)[0] else "unknown"


def _look_inside(found: Found) -> None:
    """Tell videos among the files whose name says nothing."""
    answers = map_in_order(_told_apart, found.catalogue.unknown(), LOOKING_THREADS)
    for entry, is_video in answers:
        if is_video:
            found.catalogue.add_video(entry)
        else:
            found.skip("not video")


def _told_apart(entry: Entry) -> tuple[Entry, bool]:
    try:
        return entry, looks_like_video(read_span(entry.uri, 0, SIGNATURE_BYTES))
    except OSError:
        return entry, False


def _expand(inputs: Iterable[str], found: Found) -> Iterator[Entry]:
    """Files that `inputs` stand for; a single file brings the sidecars beside it."""
    for name in inputs:
        if is_s3(name) and not is_manifest(name):
            yield from _list_prefix(name)
            continue
        path = name if is_s3(name) else str(Path(name).expanduser().absolute())
        if os.path.isdir(path):
            yield from _list_folder(path, found)
        elif not is_s3(name) and not os.path.exists(path):
            raise UserError(f"input {name} does not exist: check the path")
        elif is_manifest(path):
            _read_table(path, found.catalogue, names=True)
            yield from _named(found.catalogue.take_names(), found)
        elif path.lower().endswith(LIST_SUFFIXES):
            yield from _named(_read_list(Path(path)), found)
        else:
            yield from _with_sidecars(path)


def _named(addresses: Iterable[str], found: Found) -> Iterator[Entry]:
    """Files that a list or table names; one that is missing is the business of its dead letter."""
    for address in addresses:
        if not is_s3(address) and os.path.isdir(address):
            found.opened.add(address)
            yield from _list_folder(address, found)
        elif is_s3(address) and _kind(address) not in ("video", "archive"):
            yield from _list_prefix(address)
        elif is_s3(address):
            yield Entry(address)
        else:
            yield from _with_sidecars(address)


def _with_sidecars(path: str) -> Iterator[Entry]:
    """A single local file, and the caption files beside it."""
    yield Entry(path, file_size(path))
    for suffix in SIDECAR_SUFFIXES:
        beside = os.path.splitext(path)[0] + suffix
        if os.path.exists(beside):
            yield Entry(beside)


def _read_list(path: Path) -> Iterator[str]:
    """Addresses in a list file; relative ones are relative to the list, `#` starts a comment."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            name = line.strip()
            if not name or name.startswith("#"):
                continue
            if name.lower().endswith(LIST_SUFFIXES) or is_manifest(name):
                raise UserError(
                    f"list {path} names another list or table: name videos, folders or s3:// "
                    "prefixes, and give further lists as inputs of their own"
                )
            yield resolve(name, str(path.parent))


def _list_folder(folder: str, found: Found) -> Iterator[Entry]:
    """Files below `folder`, hidden folders and linked ones left out."""
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        # A link whose target is gone has no size; reading it will say so.
                        yield Entry(entry.path, file_size(entry.path))
                    elif not entry.name.startswith(".") and not entry.is_symlink():
                        waiting.append(entry.path)
        except OSError as error:
            found.unreadable.append((place, error))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or into what may not be entered: reading it will say so
        return False


def _list_archive(uri: str) -> Iterator[Entry]:
    """Videos in a WebDataset archive, with the captions and metadata of their samples.

    Of one that is cut off, those before its end come first, then the error.
    """
    samples: dict[str, list[Member]] = {}
    failure: OSError | tarfile.TarError | None = None
    try:
        with open_binary(uri) as file:
            for member in list_members(uri, file):
                samples.setdefault(member.key, []).append(member)
    except (OSError, tarfile.TarError) as error:
        failure = error
    for members in samples.values():
        beside = [member for member in members if _kind(member.name) == "sidecar"]
        captions = sorted(beside, key=lambda m: SIDECAR_SUFFIXES.index(_suffix(m.name)))
        notes = {m: _read_note(m) for m in captions if _suffix(m.name) == ".json"}
        files = tuple(m.uri for m in captions if notes.get(m) is None)
        note = sum((note for note in notes.values() if note is not None), NOTHING)
        for member in members:
            if member not in beside:
                yield Entry(member.uri, member.size, note, files)
    if failure is not None:
        raise failure


def _read_note(member: Member) -> Note | None:
    """What the metadata of a WebDataset sample say; none where they are a caption file of ours."""
    try:
        values = json.loads(read_bytes(member.uri))
        is_ours = not isinstance(values, dict) or "captions" in values
        return None if is_ours else Note.of({str(k).lower(): v for k, v in values.items()})
    except ValueError:
        return None  # the caption reader says what is wrong with it


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1]


def _list_prefix(uri: str) -> Iterator[Entry]:
    """The object at an `s3://` address, or those in the folder of that name."""
    folder = uri if uri.endswith("/") else f"{uri}/"
    try:
        if split_s3(uri)[1] and folder != uri:
            with suppress(MissingObjectError):
                yield Entry(uri, S3Object(uri).size)
        for address, size in list_objects(folder):
            if not address.endswith("/"):
                yield Entry(address, size)
    except StorageError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"input {uri} cannot be listed ({reason}): check the bucket, and endpoint, region and "
            "credentials in the environment"
        ) from None
