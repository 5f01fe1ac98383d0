"""Many small reads at once, without all of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 4
"""Calls under way or done, per thread, before the first of them is taken."""

T = TypeVar("T")
S = TypeVar("S")


def map_in_order(function: Callable[[T], S], items: Iterable[T], threads: int) -> Iterator[S]:
    """`function` of each item, in order, several at once.

    `Executor.map` makes a future of every item at once, a kilobyte each: too much for the listing
    of a million videos.
    """
    waiting: deque[Future[S]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == threads * AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
