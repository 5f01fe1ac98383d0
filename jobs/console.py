"""What people see: one console on stderr, progress that suits a terminal or a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

OnProgress = Callable[[int, int, Mapping[str, float]], None]
"""`on_progress(done, total, counters)`, called by a stage as its units finish."""

PLAIN_INTERVAL_S = 10.0
"""Least time between two progress lines in a log file."""

console = Console(stderr=True, highlight=False)
"""Progress and messages go to stderr; results go to stdout, where they can be piped."""


def say(message: str) -> None:
    """Print one line as it is: no markup, no wrapping, no colour guessing."""
    console.print(message, markup=False, soft_wrap=True)


@contextmanager
def progress(title: str, unit: str = "units") -> Iterator[OnProgress]:
    """Show how far a stage is: a live bar on a terminal, plain lines in a log file.

    Args:
        title: what is being done, such as "curate".
        unit: what is counted, such as "units" or "steps".

    Yields:
        `on_progress(done, total, counters)`; call it as often as convenient.
    """
    started = time.monotonic()
    if console.is_terminal:
        with _live_bar(title) as on_progress:
            yield on_progress
    else:
        yield _plain_lines(title, unit)
    say(f"{title}: finished in {format_duration(time.monotonic() - started)}")


@contextmanager
def _live_bar(title: str) -> Iterator[OnProgress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counters]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, counters="")

        def on_progress(done: int, total: int, counters: Mapping[str, float]) -> None:
            bar.update(task, completed=done, total=total, counters=format_counters(counters))

        yield on_progress


def _plain_lines(title: str, unit: str) -> OnProgress:
    started = time.monotonic()
    last_printed = -PLAIN_INTERVAL_S
    first: tuple[int, float] | None = None

    def on_progress(done: int, total: int, counters: Mapping[str, float]) -> None:
        nonlocal last_printed, first
        elapsed = time.monotonic() - started
        first = first or (done, elapsed)
        if elapsed - last_printed < PLAIN_INTERVAL_S and done < total:
            return
        last_printed = elapsed
        parts = (f"{title}: {done}/{total} {unit}", format_duration(elapsed))
        left = _time_left(done - first[0], total - done, elapsed - first[1])
        say("  ".join(part for part in (*parts, left, format_counters(counters)) if part))

    return on_progress


def _time_left(done: int, left: int, elapsed_s: float) -> str:
    """How long what is left takes at the speed of this run, where there is one yet."""
    return f"about {format_duration(elapsed_s / done * left)} left" if done and left else ""


def format_counters(counters: Mapping[str, float]) -> str:
    """`clips 1,204  loss 0.0312`: names with their numbers, those that are not zero."""
    return "  ".join(f"{name} {format_number(value)}" for name, value in counters.items() if value)


def format_number(value: float) -> str:
    """A count with thousands separators, or a measurement with four significant digits."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_bytes(count: float) -> str:
    """`512 B`, `3.4 MB`, `7.9 GB`: decimal units, as disks and files are sold."""
    for name in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {name}" if name == "B" or count >= 99.5 else f"{count:.1f} {name}"
        count /= 1000
    return f"{count:,.1f} TB"


def format_parameters(count: float) -> str:
    """`863`, `4.2K`, `5.31M`, `3.98B`."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def format_flops(count: float) -> str:
    """`1.65 GFLOP`, `94.2 TFLOP`: floating-point operations."""
    return _scaled(count, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def _scaled(count: float, units: Sequence[str]) -> str:
    """`count` with three significant digits in the largest of `units`, each 1000 of the last."""
    for unit in units[:-1]:
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.4g}{units[-1]}"
