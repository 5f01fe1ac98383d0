"""Timing variants of one thing against each other, in turn, within one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from jobs.console import OnProgress
from streamdit.model.quantise import quantise_rows

Action = Callable[[], object]

LEAST_ROUNDS = 3
"""Rounds that are timed however long they take."""


@dataclass
class Timings:
    """Times of one variant, one a round."""

    milliseconds: list[float] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        """The time that `percent` of the rounds stayed at or below, interpolated."""
        ordered = sorted(self.milliseconds)
        place = (len(ordered) - 1) * percent / 100
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    def ratio_to(self, other: Timings) -> float:
        """Median over the rounds of this time by the other's time of the same round."""
        pairs = zip(self.milliseconds, other.milliseconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    @property
    def mean(self) -> float:
        """What a run takes on average, which sets the rate of many."""
        return statistics.fmean(self.milliseconds)


def interleave(
    variants: Mapping[str, Action],
    device: torch.device,
    rounds: int,
    on_progress: OnProgress | None = None,
    warm_up: int = 2,
    parts: int = 1,
    seconds: float = math.inf,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timings]:
    """Run every variant once a round, so that what else happens on the machine hits all alike.

    The order of the variants turns from round to round.

    Args:
        variants: what to time, by name.
        device: where it runs.
        rounds: timed rounds.
        on_progress: told how many rounds are done.
        warm_up: rounds before those, not timed.
        parts: equal parts that an action consists of; times are given per part.
        seconds: no further round begins after this time, but for the least number of rounds.
        on_error: told of a variant that fails, which is then left out; raises to end it all.

    Returns:
        Timings of the variants that did not fail.
    """
    started = time.perf_counter()
    timings = {name: Timings() for name in variants}
    names = list(variants)
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            try:
                elapsed = time_once(variants[name], device) / parts
            except Exception as error:
                if on_error is None:
                    raise
                on_error(name, error)
                names.remove(name)
                del timings[name]
                continue
            if number >= 0:
                timings[name].milliseconds.append(elapsed)
        if on_progress is not None and number >= 0:
            on_progress(number + 1, rounds, {})
        if number + 1 >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
    return timings


def sustain(action: Action, device: torch.device, seconds: float) -> Timings:
    """Run `action` again and again for `seconds`, and time each run from the end of the last one.

    The device is waited for at the end only, unless the action waits for it.
    """
    timings = Timings()
    action()
    wait_for(device)
    started = last = time.perf_counter()
    while last - started < seconds:
        action()
        now = time.perf_counter()
        timings.milliseconds.append(1e3 * (now - last))
        last = now
    wait_for(device)
    timings.milliseconds[-1] += 1e3 * (time.perf_counter() - last)
    return timings


def time_once(action: Action, device: torch.device) -> float:
    """Milliseconds that `action` takes, to the end of the work it starts on an idle device."""
    wait_for(device)
    started = time.perf_counter()
    action()
    wait_for(device)
    return 1e3 * (time.perf_counter() - started)


def wait_for(device: torch.device) -> None:
    """Wait until `device` has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_action(
    shapes: Sequence[tuple[int, int, int]],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 1,
) -> tuple[Action, int]:
    """Matrix products of random `[m, k]` by `[k, n]`, and how many operations they are.

    The rate that a library reaches at these shapes is the ceiling of what is made of them. All are
    done `repeats` times: as long a load as what is measured against it, for a device that is busy
    for longer clocks lower.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    pairs = [(random(m, k), random(n, k).t()) for m, k, n in shapes]

    def run() -> None:
        for left, right in repeats * pairs:
            left @ right

    return run, repeats * sum(2 * m * k * n for m, k, n in shapes)


def float8_matmul_action(
    shapes: Sequence[tuple[int, int, int]], device: torch.device, repeats: int = 1
) -> tuple[Action, int]:
    """Like :func:`matmul_action`, of operands that are rounded to e4m3 row by row already."""
    generator = torch.Generator(device).manual_seed(0)
    pairs = [
        [quantise_rows(torch.randn(rows, k, generator=generator, device=device)) for rows in (m, n)]
        for m, k, n in shapes
    ]

    def run() -> None:
        for (left, scale), (right, other_scale) in repeats * pairs:
            torch._scaled_mm(
                left,
                right.t(),
                scale_a=scale,
                scale_b=other_scale.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

    return run, repeats * sum(2 * m * k * n for m, k, n in shapes)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers; what several modules share counts once."""
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensors.values())


class MemoryMeter:
    """Device memory that something takes once it is warm: its weights, and what comes on top.

    What a captured graph keeps for itself counts; what tuning took before :meth:`warm` does not.

    Args:
        device: where it runs.
        weights: the modules that it is made of; they are on the device already.
    """

    def __init__(self, device: torch.device, weights: Iterable[nn.Module]) -> None:
        self._device = device
        self._weights = weight_bytes(weights)
        self._before = 0
        self.peak_bytes: int | None = None

    def __enter__(self) -> MemoryMeter:
        self.warm()
        if self._device.type == "cuda":
            self._before = torch.cuda.memory_reserved(self._device)
        return self

    def warm(self) -> None:
        """Forget what was taken so far and given back."""
        wait_for(self._device)
        if self._device.type == "cuda":
            # Graphs replay in memory that is reserved for them but counts as free.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def __exit__(self, *unused: object) -> None:
        wait_for(self._device)
        if self._device.type == "cuda":
            taken = torch.cuda.max_memory_reserved(self._device) - self._before
            self.peak_bytes = self._weights + taken
