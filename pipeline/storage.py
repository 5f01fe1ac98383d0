"""Local paths, `s3://` objects and files inside tar archives, read by the same functions.

An address may also be the content itself (`data:...`, RFC 2397).
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

from pipeline.archives import Member

READ_AHEAD = 1 << 20
DATA_PREFIX = "data:"
READ_TRIES = 5
READ_WAIT_S = 0.5
"""Before a broken answer is asked for again; twice as long each time."""
MISSING_CODES = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
EXISTING_CODES = ("PreconditionFailed", "ConditionalRequestConflict")
UNSUPPORTED_CODES = ("NotImplemented",)


class StorageError(ConnectionError):
    """An S3 store refused a request, or did not answer."""


class MissingObjectError(StorageError, FileNotFoundError):
    """There is no such object in an S3 store."""


class ExistingObjectError(StorageError, FileExistsError):
    """There already is such an object in an S3 store, and it was not to be replaced."""


class UnsupportedRequestError(StorageError):
    """An S3 store does not know this kind of request."""


def is_s3(uri: str) -> bool:
    """Whether `uri` names an object of an S3 store."""
    return uri.startswith("s3://")


def is_local_file(uri: str) -> bool:
    """Whether `uri` is a path that other libraries can open."""
    return not is_s3(uri) and Member.parse(uri) is None


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def s3_client() -> Any:
    """boto3 client with endpoint, region and credentials from the standard environment.

    There is one per process: a client holds sockets, which must not be shared across a fork.
    """
    return _s3_client(os.getpid())


@functools.lru_cache(maxsize=1)
def _s3_client(process: int) -> Any:
    import boto3

    return boto3.client("s3")


def open_video(uri: str) -> str | BinaryIO:
    """What a decoder opens: the path itself, or a seekable file over an S3 object or a member."""
    return uri if is_local_file(uri) else open_binary(uri)


def open_binary(uri: str) -> BinaryIO:
    """A seekable file, whatever `uri` names."""
    if member := Member.parse(uri):
        span = FileSpan(member.archive, member.offset, member.size)
        return io.BufferedReader(span, READ_AHEAD)
    return io.BufferedReader(S3Object(uri), READ_AHEAD) if is_s3(uri) else Path(uri).open("rb")


def file_size(uri: str) -> int:
    """Bytes of a file, object or member; -1 where that fails, and reading will say why."""
    if member := Member.parse(uri):
        return member.size
    try:
        return S3Object(uri).size if is_s3(uri) else os.path.getsize(uri)
    except OSError:
        return -1


def read_bytes(uri: str) -> bytes:
    """Whole content of a small file or object."""
    if uri.startswith(DATA_PREFIX):
        return unquote_to_bytes(uri.partition(",")[2].partition("#")[0])
    if member := Member.parse(uri):
        return read_span(member.archive, member.offset, member.size)
    if not is_s3(uri):
        return Path(uri).read_bytes()
    return read_object(uri)


def read_span(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from byte `start`, fewer at the end of the file."""
    if length <= 0:
        return b""
    if member := Member.parse(uri):
        length = min(length, member.size - start)
        return read_span(member.archive, member.offset + start, length)
    if not is_s3(uri):
        with Path(uri).open("rb") as file:
            file.seek(start)
            return file.read(length)
    return read_object(uri, Range=f"bytes={start}-{start + length - 1}")


def read_object(uri: str, **arguments: str) -> bytes:
    """Content of an S3 object, or the `Range` of it.

    boto3 repeats requests that fail, but not answers that break off while they are read.

    Raises:
        StorageError: if the store refuses, or its answer breaks off again and again.
    """
    bucket, key = split_s3(uri)
    wait_s = READ_WAIT_S
    for left in reversed(range(READ_TRIES)):
        body = call_s3(uri, "get_object", Bucket=bucket, Key=key, **arguments)["Body"]
        try:
            with closing(body), _as_os_errors(uri):
                return body.read()
        except StorageError:
            if not left:
                raise
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError("the last try returns or raises")


def call_s3(uri: str, operation: str, **arguments: Any) -> Any:
    """One request about `uri`, its failure as an OSError like that of a local file."""
    with _as_os_errors(uri):
        return getattr(s3_client(), operation)(**arguments)


@contextmanager
def _as_os_errors(uri: str) -> Iterator[None]:
    """Errors of boto3, and of the connection below it, as :class:`StorageError` about `uri`."""
    import boto3.exceptions
    import botocore.exceptions
    import urllib3.exceptions

    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        kinds: dict[type[StorageError], tuple[str, ...]] = {
            MissingObjectError: MISSING_CODES,
            ExistingObjectError: EXISTING_CODES,
            UnsupportedRequestError: UNSUPPORTED_CODES,
        }
        kind = next((kind for kind, codes in kinds.items() if code in codes), StorageError)
        raise kind(f"{uri}: {error}") from None
    except (
        botocore.exceptions.BotoCoreError,
        boto3.exceptions.Boto3Error,
        urllib3.exceptions.HTTPError,
    ) as error:
        raise StorageError(f"{uri}: {error}") from None


def list_objects(uri: str) -> Iterator[tuple[str, int]]:
    """Address and size of every object under an `s3://bucket/prefix`."""
    bucket, prefix = split_s3(uri)
    request: dict[str, str] = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = call_s3(uri, "list_objects_v2", **request)
        for item in page.get("Contents", ()):
            yield f"s3://{bucket}/{item['Key']}", int(item["Size"])
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def content_version(uri: str) -> str:
    """Changes when the content of a small file or object does; empty if it cannot be read."""
    if not is_s3(uri) or Member.parse(uri):
        try:
            return hashlib.sha256(read_bytes(uri)).hexdigest()
        except OSError:
            return ""
    bucket, key = split_s3(uri)
    try:
        return str(call_s3(uri, "head_object", Bucket=bucket, Key=key)["ETag"])
    except StorageError:
        return ""


class FileSpan(io.RawIOBase):
    """Random access to a span of a file or S3 object, as a file of its own."""

    def __init__(self, uri: str, first: int, size: int) -> None:
        self.uri = uri
        self.first = first
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Current byte."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte; nothing is read yet."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current byte; returns the bytes read, 0 at the end."""
        length = min(len(buffer), self.size - self.position)
        data = read_span(self.uri, self.first + self.position, length)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class S3Object(FileSpan):
    """Random access to one S3 object by ranged reads."""

    def __init__(self, uri: str) -> None:
        bucket, key = split_s3(uri)
        head = call_s3(uri, "head_object", Bucket=bucket, Key=key)
        super().__init__(uri, 0, int(head["ContentLength"]))
