"""Local paths, `s3://` objects and files inside tar archives, read by the same functions.

An address may also be the content itself (`data:...`, RFC 2397).
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

from pipeline.archives import Member

READ_AHEAD = 1 << 20
DATA_PREFIX = "data:"
MISSING_CODES = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")


class StorageError(ConnectionError):
    """An S3 store refused a request, or did not answer."""


class MissingObjectError(StorageError, FileNotFoundError):
    """There is no such object in an S3 store."""


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
    bucket, key = split_s3(uri)
    return call_s3(uri, "get_object", Bucket=bucket, Key=key)["Body"].read()


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
    bucket, key = split_s3(uri)
    span = f"bytes={start}-{start + length - 1}"
    return call_s3(uri, "get_object", Bucket=bucket, Key=key, Range=span)["Body"].read()


def call_s3(uri: str, operation: str, **arguments: Any) -> Any:
    """One request about `uri`, its failure as an OSError like that of a local file."""
    import boto3.exceptions
    import botocore.exceptions

    try:
        return getattr(s3_client(), operation)(**arguments)
    except botocore.exceptions.ClientError as error:
        missing = error.response.get("Error", {}).get("Code") in MISSING_CODES
        raise (MissingObjectError if missing else StorageError)(f"{uri}: {error}") from None
    except (botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error) as error:
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
