"""What `streamdit doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` means that the project cannot work without it."""

    section: str
    name: str
    status: Status
    found: str
    remedy: str = ""
