"""Videos inside tar archives (WebDataset), read in place.

A member of an uncompressed archive is a span of bytes, and its address says which:
`shard.tar@OFFSET+SIZE#name.mp4`. So nothing is unpacked, and every reader that can read a span of a
file or an S3 object can read a member.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

ARCHIVE_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")

_MEMBER = re.compile(r"(?P<archive>.+\.tar)@(?P<offset>\d+)\+(?P<size>\d+)#(?P<name>.+)", re.DOTALL)


class CompressedArchiveError(ValueError):
    """Members of a compressed archive have no place of their own in the file."""


@dataclass(frozen=True)
class Member:
    """A file inside a tar archive."""

    archive: str
    """Path or `s3://` address of the archive."""
    offset: int
    """Its first byte."""
    size: int
    """Bytes."""
    name: str
    """Its path in the archive."""

    @property
    def uri(self) -> str:
        """Its address."""
        return f"{self.archive}@{self.offset}+{self.size}#{self.name}"

    @property
    def key(self) -> str:
        """What the files of one WebDataset sample share: the path up to its first dot."""
        folder, _, name = self.name.rpartition("/")
        return f"{folder}/{name.split('.', 1)[0]}"

    @staticmethod
    def parse(uri: str) -> Member | None:
        """The member that `uri` names, if it names one."""
        match = _MEMBER.fullmatch(uri)
        if match is None:
            return None
        offset, size = int(match["offset"]), int(match["size"])
        return Member(match["archive"], offset, size, match["name"])


def list_members(archive: str, file: BinaryIO) -> Iterator[Member]:
    """Files inside the archive at the address `archive`, opened as `file`; only headers are read.

    Raises:
        CompressedArchiveError: if it is compressed.
        tarfile.TarError: if it is no archive, or cut off.
    """
    if archive.endswith(COMPRESSED_SUFFIXES):
        raise CompressedArchiveError("a compressed archive cannot be read in place: unpack it")
    file.seek(0, os.SEEK_END)
    length = file.tell()
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            if not info.isfile():
                continue
            if info.offset_data + info.size > length:
                raise tarfile.ReadError(f"the archive ends within {info.name}")
            yield Member(archive, info.offset_data, info.size, info.name)
        # tarfile takes a header that is cut off or damaged for the end, which is zeros or nothing.
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"the archive is damaged or cut off at byte {tar.offset}")
