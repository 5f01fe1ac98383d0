"""Tables that describe videos: CSV, JSON lines or Parquet, one row per video or per caption.

They come in two ways: named as an input, a table lists the videos; as `metadata.csv`,
`metadata.jsonl` or `metadata.parquet` in a folder of videos (the layout of Hugging Face's
VideoFolder), it describes those that lie there.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from pipeline.storage import DATA_PREFIX, is_s3, open_binary
from streamdit.errors import UserError

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
FOLDER_MANIFESTS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
PARQUET_ROWS = 1000

ADDRESS_COLUMNS = ("uri", "video", "path", "video_path", "file_name", "url")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
LICENCE_COLUMNS = ("licence", "license")
ATTRIBUTION_COLUMNS = ("attribution", "credit", "author", "creator")
START_COLUMNS = ("start_s", "start")
END_COLUMNS = ("end_s", "end")
COLUMNS = (
    *ADDRESS_COLUMNS,
    *CAPTION_COLUMNS,
    *LICENCE_COLUMNS,
    *ATTRIBUTION_COLUMNS,
    *START_COLUMNS,
    *END_COLUMNS,
)


class ManifestError(UserError):
    """A table of videos is not understood."""


@dataclass(frozen=True)
class Note:
    """What a table says about one video."""

    cues: tuple[tuple[str, float | None, float | None], ...] = ()
    """Captions, each with the seconds it describes; none is the start or the end of the video."""
    licence: str | None = None
    """Terms of use."""
    attribution: str | None = None
    """Whom to name."""

    def __add__(self, other: Note) -> Note:
        """Both together: all captions, and the first licence and attribution."""
        return Note(
            self.cues + other.cues,
            self.licence or other.licence,
            self.attribution or other.attribution,
        )

    def sidecars(self) -> tuple[str, ...]:
        """The captions as a caption file that lies within its own address (RFC 2397)."""
        if not self.cues:
            return ()
        spans = [
            {"caption": text}
            | ({} if start_s is None else {"start": start_s})
            | ({} if end_s is None else {"end": end_s})
            for text, start_s, end_s in self.cues
        ]
        return (f"{DATA_PREFIX}application/json,{quote(json.dumps(spans))}#captions.manifest",)

    @staticmethod
    def of(row: Mapping[str, Any]) -> Note:
        """What a row (columns by lower-case name) says.

        Raises:
            ValueError: if a time is not a number.
        """
        text = _first_text(row, CAPTION_COLUMNS)
        cue = (text or "", _seconds(row, START_COLUMNS), _seconds(row, END_COLUMNS))
        return Note(
            cues=(cue,) if text else (),
            licence=_first_text(row, LICENCE_COLUMNS),
            attribution=_first_text(row, ATTRIBUTION_COLUMNS),
        )


def is_manifest(uri: str) -> bool:
    """Whether `uri` names a table."""
    return uri.lower().endswith(MANIFEST_SUFFIXES)


def read_manifest(uri: str) -> Iterator[tuple[str, Note]]:
    """Address and note of each row of the table at `uri` (path or `s3://`).

    Relative addresses are relative to the table's folder. Column names are those at the top of
    this module, in any case; others are left out. Rows come as they are read: an error may come
    after some.

    Raises:
        ManifestError: if the table cannot be read, or no column tells where the videos are.
    """
    folder = uri.rpartition("/")[0]
    done = 0
    try:
        for row in _rows(uri):
            address = _first_text(row, ADDRESS_COLUMNS)
            if address is None:
                raise _no_address(uri, done + 1, row)
            yield resolve(address, folder), Note.of(row)
            done += 1
    except ManifestError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise ManifestError(
            f"manifest {uri} cannot be read after {done} rows ({' '.join(str(error).split())}): "
            "write UTF-8 CSV with a header, JSON lines or Parquet"
        ) from None


def resolve(address: str, folder: str) -> str:
    """Absolute form of an address found in a table or list that lies in `folder`."""
    if is_s3(address) or "://" in address:
        return address
    if is_s3(folder):
        root, slash, rest = folder.removeprefix("s3://").partition("/")
        return f"s3://{root}/{posixpath.normpath(f'{rest}{slash}{address}')}"
    return str(Path(folder) / Path(address).expanduser())


def _rows(uri: str) -> Iterator[dict[str, Any]]:
    """Rows with lower-case column names."""
    suffix = uri.lower().rsplit(".", 1)[-1]
    with open_binary(uri) as file:
        if suffix == "parquet":
            raw: Iterable[Mapping[str, Any]] = _parquet_rows(file)
        elif suffix in ("csv", "tsv"):
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            raw = csv.DictReader(text, delimiter="\t" if suffix == "tsv" else ",", strict=True)
        else:
            raw = _json_rows(file)
        for row in raw:
            if not isinstance(row, Mapping):
                raise ValueError(f"{row!r} is not an object")
            yield {str(name).lower(): value for name, value in row.items() if name is not None}


def _json_rows(file: BinaryIO) -> Iterator[Any]:
    # Lines of bytes: JSON may hold other line separators within its texts.
    for number, line in enumerate(file):
        text = line.decode("utf-8" if number else "utf-8-sig")
        if text.strip():
            yield json.loads(text)


def _parquet_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False) as table:
        known = [name for name in table.schema_arrow.names if name.lower() in COLUMNS]
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=known):
            yield from batch.to_pylist()


def _first_text(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that holds something; Hugging Face nests paths in objects."""
    for name in names:
        value = row.get(name)
        value = value.get("path") if isinstance(value, Mapping) else value
        if value is not None and str(value).strip():
            return str(value).strip()
    return None


def _seconds(row: Mapping[str, Any], names: Iterable[str]) -> float | None:
    text = _first_text(row, names)
    return None if text is None else float(text)


def _no_address(uri: str, number: int, row: Mapping[str, Any]) -> ManifestError:
    if set(row).isdisjoint(ADDRESS_COLUMNS):
        return ManifestError(
            f"manifest {uri} does not say where the videos are (columns: {', '.join(row)}): name "
            f"one of its columns {', '.join(ADDRESS_COLUMNS)}"
        )
    return ManifestError(
        f"manifest {uri} names no video in row {number}: fill it in, or drop the row"
    )
