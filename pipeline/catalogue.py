"""What a listing found, in a database on disk: of a million videos, memory holds a few thousand."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.manifests import Note
from streamdit.errors import UserError

PAGE = 1000
"""Rows that are read at once. Between pages no statement is open, so tables may change."""
CACHE_KB = 16_000
NOTHING = Note()

ENTRIES = """
CREATE TABLE videos (uri BLOB PRIMARY KEY, size INTEGER, note TEXT, sidecars TEXT) WITHOUT ROWID;
CREATE TABLE unknown (uri BLOB PRIMARY KEY, size INTEGER, note TEXT, sidecars TEXT) WITHOUT ROWID;
CREATE TABLE captions (stem BLOB, suffix TEXT, PRIMARY KEY (stem, suffix)) WITHOUT ROWID;
CREATE TABLE notes (uri BLOB, number INTEGER, note TEXT, PRIMARY KEY (uri, number)) WITHOUT ROWID;
CREATE TABLE named (uri BLOB PRIMARY KEY) WITHOUT ROWID;
"""
SOURCES = "CREATE TABLE sources (source_id TEXT PRIMARY KEY, source TEXT) WITHOUT ROWID;"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that may be a video."""

    uri: str
    size: int | None = None
    """Bytes; none where nobody has looked yet, -1 where they cannot be told."""
    note: Note = NOTHING
    """What its archive says about it."""
    sidecars: tuple[str, ...] = ()
    """Caption files that lie in its archive."""


@dataclass(frozen=True, slots=True)
class Source:
    """One video, known by its content."""

    source_id: str
    """Hash of its size, first and last megabyte; 16 hexadecimal digits."""
    uri: str
    """Absolute path, `s3://` address, or address in an archive (:mod:`pipeline.archives`)."""
    size: int
    """Bytes."""
    sidecars: tuple[str, ...] = ()
    """Addresses of its captions, in the order of preference."""
    licence: str | None = None
    """Terms of use, where a table tells them."""
    attribution: str | None = None
    """Whom to name, where a table tells it."""

    @staticmethod
    def of(values: dict[str, Any]) -> Source:
        """From the fields as JSON holds them."""
        return Source(**{**values, "sidecars": tuple(values["sidecars"])})


class Catalogue:
    """Files by what they are, before any video is opened."""

    def __init__(self) -> None:
        self._database = _open(ENTRIES)
        self._notes = 0

    def add_video(self, entry: Entry) -> None:
        """A file that is a video. Found again, it keeps what its archive said."""
        again = "ON CONFLICT (uri) DO UPDATE SET size = COALESCE(excluded.size, size)"
        self._database.execute(f"INSERT INTO videos VALUES (?, ?, ?, ?) {again}", _row(entry))

    def add_unknown(self, entry: Entry) -> None:
        """A file whose name does not say what it is."""
        self._database.execute("INSERT OR IGNORE INTO unknown VALUES (?, ?, ?, ?)", _row(entry))

    def add_captions(self, uri: str) -> None:
        """A caption file, which may lie beside a video."""
        stem, suffix = os.path.splitext(uri)
        self._database.execute(
            "INSERT OR IGNORE INTO captions VALUES (?, ?)", (_encode(stem), suffix)
        )

    def add_note(self, uri: str, note: Note) -> None:
        """What a row of a table says about a video, after what others said."""
        self._notes += 1
        values = (_encode(uri), self._notes, json.dumps(asdict(note)))
        self._database.execute("INSERT INTO notes VALUES (?, ?, ?)", values)

    def add_name(self, uri: str) -> None:
        """An address that a table names; see :meth:`take_names`."""
        self._database.execute("INSERT OR IGNORE INTO named VALUES (?)", (_encode(uri),))

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is added inside is taken back if it ends in an exception."""
        self._database.execute("SAVEPOINT table_of_videos")
        try:
            yield
        except sqlite3.Error:
            raise  # whatever was open is rolled back already
        except BaseException:
            self._database.execute("ROLLBACK TO table_of_videos")
            self._database.execute("RELEASE table_of_videos")
            raise
        self._database.execute("RELEASE table_of_videos")

    def take_names(self) -> Iterator[str]:
        """Addresses of :meth:`add_name`, sorted, each once; then they are forgotten."""
        for (uri,) in _pages(self._database, "named", "uri", b""):
            yield _decode(uri)
        self._database.execute("DELETE FROM named")

    def videos(self) -> Iterator[Entry]:
        """Videos, sorted by address."""
        return map(_entry, _pages(self._database, "videos", "uri", b""))

    def unknown(self) -> Iterator[Entry]:
        """Files of which nobody knows what they are, sorted by address."""
        return map(_entry, _pages(self._database, "unknown", "uri", b""))

    def has_video(self, uri: str) -> bool:
        """Whether there is a video at this address."""
        found = self._database.execute("SELECT 1 FROM videos WHERE uri = ?", (_encode(uri),))
        return found.fetchone() is not None

    def note_on(self, uri: str) -> Note:
        """What tables say about a video."""
        query = "SELECT note FROM notes WHERE uri = ? ORDER BY number"
        rows = self._database.execute(query, (_encode(uri),)).fetchall()
        return sum((_note(text) for (text,) in rows), NOTHING)

    def captions_beside(self, uri: str) -> set[str]:
        """Suffixes of the caption files beside a video."""
        stem = os.path.splitext(uri)[0]
        query = "SELECT suffix FROM captions WHERE stem = ?"
        return {suffix for (suffix,) in self._database.execute(query, (_encode(stem),)).fetchall()}


class Sources:
    """Sources by their id."""

    def __init__(self) -> None:
        self._database = _open(SOURCES)

    def add(self, source: Source) -> bool:
        """Whether it is new; of several with the same content the first stays."""
        values = (source.source_id, json.dumps(asdict(source)))
        added = self._database.execute("INSERT OR IGNORE INTO sources VALUES (?, ?)", values)
        return added.rowcount > 0

    def take(self, source_id: str) -> Source | None:
        """The source of this id, which is then gone; none if there is none."""
        query = "SELECT source FROM sources WHERE source_id = ?"
        row = self._database.execute(query, (source_id,)).fetchone()
        if row is None:
            return None
        self._database.execute("DELETE FROM sources WHERE source_id = ?", (source_id,))
        return Source.of(json.loads(row[0]))

    def __len__(self) -> int:
        count: int = self._database.execute("SELECT COUNT(*) FROM sources").fetchone()[0]
        return count

    def __iter__(self) -> Iterator[Source]:
        """In the order of their ids."""
        for _, text in _pages(self._database, "sources", "source_id", ""):
            yield Source.of(json.loads(text))


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a failure of the database into one line.

    Raises:
        UserError: if there is no room for it.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(
            f"the list of videos cannot be kept in {tempfile.gettempdir()} ({error}): make room "
            "there, or name another folder by TMPDIR"
        ) from None


def _open(tables: str) -> sqlite3.Connection:
    # The empty name is a file that SQLite makes when its cache is full and removes when it is done.
    database = sqlite3.connect("", isolation_level=None)
    database.execute(f"PRAGMA cache_size = -{CACHE_KB}")
    database.executescript(tables)
    database.execute("BEGIN")
    return database


def _pages(
    database: sqlite3.Connection, table: str, key: str, after: bytes | str
) -> Iterator[tuple[Any, ...]]:
    """Rows in the order of their key, which is their first column."""
    query = f"SELECT * FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT {PAGE}"
    while rows := database.execute(query, (after,)).fetchall():
        yield from rows
        after = rows[-1][0]


def _encode(uri: str) -> bytes:
    # File names need not be UTF-8, and SQLite's text must be.
    return uri.encode("utf-8", "surrogatepass")


def _decode(uri: bytes) -> str:
    return uri.decode("utf-8", "surrogatepass")


def _row(entry: Entry) -> tuple[bytes, int | None, str, str]:
    note, sidecars = json.dumps(asdict(entry.note)), json.dumps(entry.sidecars)
    return _encode(entry.uri), entry.size, note, sidecars


def _entry(row: tuple[Any, ...]) -> Entry:
    uri, size, note, sidecars = row
    return Entry(_decode(uri), size, _note(note), tuple(json.loads(sidecars)))


def _note(text: str) -> Note:
    values = json.loads(text)
    return Note(**{**values, "cues": tuple(tuple(cue) for cue in values["cues"])})
