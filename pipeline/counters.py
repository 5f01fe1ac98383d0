"""Totals of a unit, as its marker keeps them: for summaries, and to see when too much fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.dead_letters import DeadLetter
from pipeline.schema import FileRecord

Counters = dict[str, float]
"""Where things can fail: `inputs`, and of these `lost`; `dead` letters, and of these `retryable`,
which another run may mend."""


def curate_counters(
    sources: Sequence[Mapping[str, Any]], clips: int, dead: Sequence[DeadLetter]
) -> Counters:
    """Totals of rows of the source table."""
    return {
        "sources": len(sources),
        "clips": clips,
        "dead": len(dead),
        "retryable": sum(letter.retryable for letter in dead),
        "inputs": len(sources) + len(dead),
        "lost": len(dead),
        "video_s": sum(source["duration_s"] for source in sources),
    }


def annotate_counters(
    annotations: Sequence[Mapping[str, Any]], dead: Sequence[DeadLetter]
) -> Counters:
    """Totals of rows of the annotation table."""
    statuses = [row["caption_status"] for row in annotations]
    return {
        "clips": len(annotations),
        "captions": statuses.count("ok"),
        "missing": statuses.count("missing"),
        "failed": statuses.count("failed"),
        "dead": len(dead),
        "retryable": sum(letter.retryable for letter in dead),
        "inputs": len(annotations),
        "lost": sum(is_lost(row) for row in annotations),
    }


def latent_counters(files: Sequence[FileRecord], dead: Sequence[DeadLetter]) -> Counters:
    """Totals of latent shards."""
    clips = sum(record.rows for record in files)
    return {"clips": clips, "dead": len(dead), "inputs": clips + len(dead), "lost": len(dead)}


def text_counters(files: Sequence[FileRecord]) -> Counters:
    """Totals of text shards."""
    return {"texts": sum(record.rows for record in files)}


def is_lost(annotation: Mapping[str, Any]) -> bool:
    """Whether a caption or a score of this clip could not be had."""
    return annotation["caption_status"] == "failed" or annotation["colourfulness"] is None
