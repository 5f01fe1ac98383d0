"""The table that `streamdit bench` prints."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.table import Table

from jobs.bench_rows import Row
from jobs.console import format_bytes, format_flops


def bench_table(rows: list[Row]) -> Table:
    """One line per variant; columns that no variant fills are left out."""
    columns: list[tuple[str, list[str]]] = [
        ("p50 ms", [_optional(row.p50_ms, _milliseconds) for row in rows]),
        ("p95 ms", [_optional(row.p95_ms, _milliseconds) for row in rows]),
        (
            "speed-up",
            [_optional(row.versus_plain, "{:.2f}×".format) for row in rows],
        ),
        ("FPS", [f"{row.fps:.4g}" if row.fps else "" for row in rows]),
        ("clips/s", [_optional(row.clips_per_second, "{:.3g}".format) for row in rows]),
        ("rate", [_optional(row.flops_per_second, _rate) for row in rows]),
        ("ceiling", [_optional(row.share_of_ceiling, "{:.0%}".format) for row in rows]),
        ("MFU", [_optional(row.model_flops_utilisation, "{:.1%}".format) for row in rows]),
        ("memory", [_optional(row.peak_bytes, format_bytes) for row in rows]),
        ("differs", [_optional(row.difference, _difference) for row in rows]),
        ("verdict", [row.verdict or "" for row in rows]),
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    shown = [(title, cells) for title, cells in columns if any(cells)]
    for title, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(row.variant, *(cells[index] for _, cells in shown))
    return table


def _difference(relative: float) -> str:
    return "0" if relative == 0 else f"{relative:.0e}"


def _optional(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _rate(flops_per_second: float) -> str:
    return f"{format_flops(flops_per_second)}/s"
