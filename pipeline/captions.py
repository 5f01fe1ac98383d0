"""Captions from time-coded files beside the video."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.storage import read_bytes

_TIMING = re.compile(r"^\s*(\S+)\s+-->\s+(\S+)")
_TAG = re.compile(r"<[^>]*>")


class CaptionFileError(ValueError):
    """A caption file cannot be understood."""


@dataclass(frozen=True)
class Cue:
    """A caption and the span that it describes, in seconds; without an end it is the whole."""

    text: str
    start_s: float = 0.0
    end_s: float = float("inf")


def read_cues(uri: str) -> list[Cue]:
    """Captions of a `.vtt`, `.json` or `.txt` file.

    JSON is a text, an object with `caption` (and optionally `start` and `end` in seconds), an
    object with a list of such under `captions`, or that list itself.

    Raises:
        CaptionFileError: if the file is not valid UTF-8 or not of its format.
    """
    try:
        text = read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionFileError(f"{uri} is not UTF-8 text ({error.reason})") from None
    suffix = uri.rsplit(".", 1)[-1]
    try:
        if suffix == "vtt":
            return parse_vtt(text)
        if suffix in ("json", "manifest"):
            return parse_json(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise CaptionFileError(f"{uri} is not a caption file ({error})") from None
    return _non_empty([Cue(text)])


def parse_vtt(text: str) -> list[Cue]:
    """Cues of a WebVTT file; notes, styles and markup are dropped."""
    if not text.startswith("WEBVTT"):
        raise CaptionFileError("it does not start with WEBVTT")
    cues = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip().split("\n")
        # A cue may carry an identifier in the line above its timing.
        for i, line in enumerate(lines[:2]):
            if timing := _TIMING.match(line):
                spoken = html.unescape(_TAG.sub("", " ".join(lines[i + 1 :])))
                cues.append(Cue(spoken, _seconds(timing[1]), _seconds(timing[2])))
                break
    return _non_empty(cues)


def parse_json(value: Any) -> list[Cue]:
    """Cues of a decoded JSON caption file, see :func:`read_cues`."""
    if isinstance(value, dict) and "captions" in value:
        value = value["captions"]
    if isinstance(value, (str, dict)):
        value = [value]
    if not isinstance(value, list):
        raise CaptionFileError("it holds neither a caption nor a list of captions")
    cues = []
    for item in value:
        if isinstance(item, str):
            cues.append(Cue(item))
            continue
        if not isinstance(item, dict):
            raise CaptionFileError(f"{item!r} is no caption")
        end_s = item.get("end")
        cues.append(
            Cue(
                str(item["caption"]),
                float(item.get("start") or 0.0),
                float("inf") if end_s is None else float(end_s),
            )
        )
    return _non_empty(cues)


def caption_for(cues: Sequence[Cue], start_s: float, end_s: float) -> str | None:
    """The caption of a clip: of the cue that covers most of the clip's middle half.

    The middle, because the first and last frames of a clip often belong to a neighbour's cue. The
    earlier cue wins a tie; a clip whose middle no cue touches has no caption.
    """
    quarter = (end_s - start_s) / 4
    low, high = start_s + quarter, end_s - quarter
    best, most = None, 0.0
    for cue in cues:
        overlap = min(cue.end_s, high) - max(cue.start_s, low)
        if overlap > most + 1e-9:
            best, most = cue.text, overlap
    return best


def _seconds(timestamp: str) -> float:
    """`[hh:]mm:ss.mmm` in seconds."""
    total = 0.0
    for part in timestamp.replace(",", ".").split(":"):
        total = total * 60 + float(part)
    return total


def _non_empty(cues: list[Cue]) -> list[Cue]:
    """Cues with white space collapsed, those without words left out."""
    cleaned = [Cue(" ".join(cue.text.split()), cue.start_s, cue.end_s) for cue in cues]
    return [cue for cue in cleaned if cue.text]
