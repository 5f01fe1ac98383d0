"""Where a dataset lies: a folder on disk, or a prefix of an S3 store.

Paths are relative to the dataset and use `/`. A file appears under its name whole or not at all:
on disk it is written under a hidden name and renamed, on S3 it is uploaded from an unnamed file.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.storage import (
    READ_AHEAD,
    ExistingObjectError,
    S3Object,
    UnsupportedRequestError,
    call_s3,
    is_s3,
    list_objects,
    open_binary,
    read_bytes,
    split_s3,
)

DatasetPath = Path | str
"""A folder, or `s3://bucket/prefix`."""


class Sink(ABC):
    """A file under way."""

    file: BinaryIO
    """What to write to."""

    def digest(self) -> tuple[int, str]:
        """Bytes written, and their SHA-256."""
        self.file.flush()
        self.file.seek(0)
        digest = hashlib.file_digest(self.file, "sha256").hexdigest()
        return self.file.tell(), digest

    def finish(self) -> tuple[int, str]:
        """Give the file its name; returns its bytes and their SHA-256."""
        size, digest = self.digest()
        self._publish()
        return size, digest

    def discard(self) -> None:
        """Forget what was written."""
        self.file.close()

    @abstractmethod
    def _publish(self) -> None:
        """Make the content appear, and close the file."""


class Store(ABC):
    """Files of one dataset."""

    root: str
    """The folder, or `s3://bucket/prefix`."""

    def uri(self, path: str) -> str:
        """Full address of a file of the dataset."""
        return f"{self.root}/{path}"

    def read_text(self, path: str) -> str:
        """Content of a small file.

        Raises:
            FileNotFoundError: if there is none.
        """
        return read_bytes(self.uri(path)).decode("utf-8")

    def write_text(self, path: str, text: str) -> None:
        """Replace a small file by a whole new one."""
        sink = self.sink(path)
        sink.file.write(text.encode("utf-8"))
        sink.finish()

    def sha256(self, path: str) -> str:
        """Hash of the content of a file."""
        with open_binary(self.uri(path)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return self.size(path) is not None

    @abstractmethod
    def create_text(self, path: str, text: str) -> bool:
        """Write a small file unless there is one; of several who try at once, one succeeds."""

    @abstractmethod
    def source(self, path: str) -> str | BinaryIO:
        """What PyArrow reads: a path, or a seekable file."""

    @abstractmethod
    def sink(self, path: str) -> Sink:
        """Begin to write a file."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Bytes of a file; none if there is none."""

    @abstractmethod
    def files(self, folder: str = "") -> dict[str, int]:
        """Every file below `folder`, hidden ones too: path to bytes, sorted by path."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def delete_if_empty(self) -> None:
        """Remove the dataset's own folder, if there is one and nothing is in it."""

    @abstractmethod
    def local_folder(self, folder: str) -> AbstractContextManager[str]:
        """A folder of the dataset as one on this machine's disk, for as long as the context."""

    def put_folder(self, local: Path, folder: str) -> None:
        """Replace a folder of the dataset by a copy of one on disk."""
        wanted = {
            f"{folder}/{path.relative_to(local).as_posix()}": path
            for path in sorted(local.rglob("*"))
            if path.is_file()
        }
        for path in self.files(folder):
            if path not in wanted:
                self.delete(path)
        for path, origin in wanted.items():
            sink = self.sink(path)
            with origin.open("rb") as file:
                shutil.copyfileobj(file, sink.file)
            sink.finish()


def open_store(dataset_dir: DatasetPath | Store) -> Store:
    """The store of a dataset directory; nothing is read yet."""
    if isinstance(dataset_dir, Store):
        return dataset_dir
    text = str(dataset_dir)
    if text.startswith("s3:/") and not is_s3(text):
        text = "s3://" + text.removeprefix("s3:/")  # a Path merges the slashes
    if is_s3(text):
        return S3Store(text.rstrip("/"))
    return DiskStore(os.path.abspath(text))


class _DiskSink(Sink):
    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self.target = target
        self.partial = partial_path(target)
        self.file = self.partial.open("w+b")

    def _publish(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.target)

    def discard(self) -> None:
        super().discard()
        self.partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Hidden name under which `path` is written; a rerun overwrites what a crash left there."""
    return path.with_name(f".{path.name}.partial")


class DiskStore(Store):
    """A dataset in a folder; a cluster needs one that all its machines share."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.folder = Path(root)

    def create_text(self, path: str, text: str) -> bool:
        """Write a small file unless there is one."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(target.with_name(f"{target.name}.{uuid.uuid4().hex}"))
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_in_place(target, text)
        finally:
            partial.unlink(missing_ok=True)
        return True

    @staticmethod
    def _create_in_place(target: Path, text: str) -> bool:
        """Whoever reads at that very moment finds the file empty."""
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def source(self, path: str) -> str:
        """Absolute path of a file."""
        return self.uri(path)

    def sink(self, path: str) -> Sink:
        """Begin to write a file under a hidden name."""
        return _DiskSink(self.folder / path)

    def size(self, path: str) -> int | None:
        """Bytes of a file; none if there is none."""
        try:
            return (self.folder / path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def files(self, folder: str = "") -> dict[str, int]:
        """Every file below `folder`: path to bytes, sorted by path."""
        found = {
            path.relative_to(self.folder).as_posix(): path.stat().st_size
            for path in (self.folder / folder).rglob("*")
            if path.is_file()
        }
        return dict(sorted(found.items()))

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / path).unlink(missing_ok=True)

    def delete_if_empty(self) -> None:
        """Remove the folder, if nothing is in it."""
        with suppress(OSError):
            self.folder.rmdir()

    def local_folder(self, folder: str) -> AbstractContextManager[str]:
        """The folder itself."""
        return nullcontext(self.uri(folder))


class _S3Sink(Sink):
    def __init__(self, uri: str) -> None:
        self.uri = uri
        # Without a name, so that nothing is left behind however this process ends.
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def _publish(self) -> None:
        bucket, key = split_s3(self.uri)
        self.file.seek(0)
        with self.file as file:
            # boto3 closes what it uploads.
            call_s3(self.uri, "upload_fileobj", Fileobj=file, Bucket=bucket, Key=key)


class S3Store(Store):
    """A dataset under a prefix of an S3 store; an object is replaced whole or not at all."""

    def __init__(self, root: str) -> None:
        self.root = root

    def create_text(self, path: str, text: str) -> bool:
        """Write a small object unless there is one.

        Where the store knows no conditional writes, two who try at the same moment both succeed.
        """
        if self.exists(path):
            return False
        uri = self.uri(path)
        bucket, key = split_s3(uri)
        try:
            call_s3(uri, "put_object", Bucket=bucket, Key=key, Body=text.encode(), IfNoneMatch="*")
        except ExistingObjectError:
            return False
        except UnsupportedRequestError:
            self.write_text(path, text)
        return True

    def source(self, path: str) -> BinaryIO:
        """A seekable file over ranged reads."""
        return io.BufferedReader(S3Object(self.uri(path)), READ_AHEAD)

    def sink(self, path: str) -> Sink:
        """Begin to write an object."""
        return _S3Sink(self.uri(path))

    def size(self, path: str) -> int | None:
        """Bytes of an object; none if there is none."""
        try:
            return S3Object(self.uri(path)).size
        except FileNotFoundError:
            return None

    def files(self, folder: str = "") -> dict[str, int]:
        """Every object below `folder`: path to bytes, sorted by path."""
        prefix = self.uri(folder).rstrip("/") + "/"
        start = len(self.root) + 1
        return {uri[start:]: size for uri, size in sorted(list_objects(prefix))}

    def delete(self, path: str) -> None:
        """Remove an object, if it is there."""
        bucket, key = split_s3(self.uri(path))
        call_s3(self.uri(path), "delete_object", Bucket=bucket, Key=key)

    def delete_if_empty(self) -> None:
        """Nothing to do: a prefix is there as long as an object is."""

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[str]:
        """A temporary copy of the folder."""
        with tempfile.TemporaryDirectory(prefix="streamdit-") as copy:
            for path in self.files(folder):
                target = Path(copy) / path.removeprefix(f"{folder}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(read_bytes(self.uri(path)))
            yield copy


def walk_parquet(store: Store, folder: str) -> Iterator[str]:
    """Published tables below `folder`, in order."""
    for path in store.files(folder):
        if path.endswith(".parquet") and not path.rsplit("/", 1)[-1].startswith("."):
            yield path
