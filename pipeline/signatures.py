"""Telling videos by their first bytes, for files whose name says nothing."""

from __future__ import annotations

SIGNATURE_BYTES = 192
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_AUDIO_BRANDS = (b"M4A ", b"M4B ")


def looks_like_video(head: bytes) -> bool:
    """Whether a file that starts with `head` (192 bytes suffice) is in a video container.

    Known are MP4 and QuickTime, Matroska and WebM, AVI, FLV, ASF, MPEG program and transport
    streams, and YUV4MPEG.
    """
    if head[4:8] == b"ftyp":
        return head[8:12] not in _STILL_BRANDS + _AUDIO_BRANDS
    if head[4:8] in (b"moov", b"mdat", b"wide"):
        return True
    if head.startswith(b"RIFF"):
        return head[8:12] == b"AVI "
    if head[:1] == b"\x47":  # a transport stream repeats its sync byte every 188
        return head[188:189] == b"\x47"
    return head.startswith(
        (
            b"\x1a\x45\xdf\xa3",  # EBML: Matroska, WebM
            b"FLV\x01",
            b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF
            b"\x00\x00\x01\xba",  # MPEG program stream
            b"YUV4MPEG2 ",
        )
    )
