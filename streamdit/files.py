"""Small files that are there whole or not at all, whenever their writer is killed."""

from __future__ import annotations

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file, or put it in the place of an older one, in one step; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)
