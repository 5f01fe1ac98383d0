"""Sources that were taken out of a dataset, and stay out."""

from __future__ import annotations

import json
from collections.abc import Iterable

from pipeline.sources import Listing
from pipeline.store import Store

REMOVED_FILE = "removed.json"


def read_removed(store: Store) -> set[str]:
    """Ids of sources that were removed; an id is a hash and tells nothing about the video."""
    try:
        return set(json.loads(store.read_text(REMOVED_FILE)))
    except FileNotFoundError:
        return set()


def leave_out_removed(store: Store, listing: Listing) -> Listing:
    """The listing without sources that were removed from the dataset; they are counted."""
    gone = [name for name in read_removed(store) if listing.sources.take(name)]
    if gone:
        listing.skipped["removed"] = len(gone)
    return listing


def forbid(store: Store, source_ids: Iterable[str]) -> None:
    """Keep sources from coming back."""
    ids = sorted(read_removed(store) | set(source_ids))
    store.write_text(REMOVED_FILE, json.dumps(ids, indent=1) + "\n")
