"""Near-duplicate clips across a dataset, by the hashes of three of their frames.

Two clips are near duplicates when their hashes (192 bits together) differ in few bits. Comparing
all pairs would be quadratic; instead the bits are cut into bands. Two hashes that differ in fewer
bits than there are bands agree on at least one band entirely, so comparing only those that share a
band misses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BITS = 192
BYTES = BITS // 8
BANDS = 12
BAND_BITS = BITS // BANDS
MAX_DISTANCE = BANDS - 1
"""Largest number of differing bits for which no pair is missed."""
PAIRS_AT_ONCE = 1 << 20


class Duplicates(NamedTuple):
    """The clips that have near duplicates, ordered by clip id."""

    clips: np.ndarray
    """`int64 [d]`: their places among all clips."""
    kept: np.ndarray
    """`int64 [d]`: place of the clip that stands for the group of each."""
    sizes: np.ndarray
    """`int64 [d]`: clips of the group."""


def find_duplicates(
    clip_ids: np.ndarray, codes: np.ndarray, pixels: np.ndarray, max_distance: int
) -> Duplicates:
    """Groups of more than one clip, whatever the order in which the clips come.

    Args:
        clip_ids: `[n]`, bytes.
        codes: `uint8 [n, 24]`, hash of each clip.
        pixels: `int64 [n]`, size of each clip's source.
        max_distance: bits in which near duplicates differ at most.
    """
    order = np.argsort(clip_ids)  # chains do not depend on it, their names must not
    groups = find_groups(codes[order], max_distance)
    chosen = choose_representatives(groups, clip_ids[order], pixels[order])
    sizes = np.bincount(groups, minlength=len(groups))[groups]
    several = np.flatnonzero(sizes > 1)
    return Duplicates(order[several], order[chosen[several]], sizes[several])


def find_groups(codes: np.ndarray, max_distance: int) -> np.ndarray:
    """Group of each hash: chains of hashes that differ in at most `max_distance` bits.

    Args:
        codes: `uint8 [n, 24]`, hashes of 192 bits.
        max_distance: bits, at most :data:`MAX_DISTANCE`.

    Returns:
        `int64 [n]`: for each hash the index of the first one of its group.
    """
    assert 0 <= max_distance <= MAX_DISTANCE
    if not len(codes):
        return np.empty(0, np.int64)
    unique, first, which = _unique_rows(codes)
    forest = _Forest(len(unique))
    for left, right in _near_pairs(unique, max_distance):
        forest.join(left, right)
    roots = forest.roots()
    earliest = np.full(len(unique), len(codes), np.int64)
    np.minimum.at(earliest, roots, first)
    return earliest[roots][which]


def choose_representatives(
    groups: np.ndarray, clip_ids: np.ndarray, pixels: np.ndarray
) -> np.ndarray:
    """Index of the clip that stands for each clip's group: most source pixels, then smallest id."""
    order = np.lexsort((clip_ids, -pixels))
    best = np.full(len(groups), -1, np.int64)
    best[groups[order[::-1]]] = order[::-1]  # the last to be written is the best one
    return best[groups]


def _unique_rows(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different rows, index of the first of each, and which of them every row is."""
    packed = codes.view([("", f"V{BYTES}")]).ravel()
    values, first, which = np.unique(packed, return_index=True, return_inverse=True)
    return values.view(np.uint8).reshape(-1, BYTES), first, which.ravel()


def _near_pairs(codes: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that differ in few bits, in portions; a pair may come once per band."""
    bands = codes.view(np.uint16)
    words = codes.view(np.uint64)
    for band in range(BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        ordered = words[order]  # pairs are neighbours now, which memory caches like
        for left, right in _equal_pairs(bands[order, band]):
            near = _distance(ordered[left], ordered[right]) <= max_distance
            yield order[left[near]], order[right[near]]


def _equal_pairs(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places of equal values in a sorted array, about a million at a time."""
    ends = np.searchsorted(values, values, side="right")
    partners = ends - np.arange(len(values)) - 1  # behind each place, within its run
    totals = np.cumsum(partners)
    first = 0
    while first < len(values):
        done = totals[first - 1] if first else 0
        last = int(np.searchsorted(totals, done + PAIRS_AT_ONCE, side="right"))
        last = max(last, first + 1)
        counts = partners[first:last]
        left = np.repeat(np.arange(first, last), counts)
        starts = np.cumsum(counts) - counts
        yield left, left + 1 + np.arange(len(left)) - np.repeat(starts, counts)
        first = last


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits in which rows of `uint64 [n, words]` differ."""
    counts = np.bitwise_count(left ^ right)
    return counts[:, 0] + counts[:, 1] + counts[:, 2]


class _Forest:
    """Sets that only grow together (union-find over arrays)."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size)

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Put the two ends of each pair into one set; the smallest member names it."""
        while left.size:
            self._flatten()
            a, b = self.parent[left], self.parent[right]
            apart = a != b
            left, right, a, b = left[apart], right[apart], a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def roots(self) -> np.ndarray:
        """Name of each member's set."""
        self._flatten()
        return self.parent

    def _flatten(self) -> None:
        while not np.array_equal(grand := self.parent[self.parent], self.parent):
            self.parent = grand
