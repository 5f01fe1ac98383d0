"""`streamdit doctor`: what this machine has, what is missing, and the remedy."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.console import console
from jobs.findings import Finding
from jobs.machine import examine

STYLES = {"ok": "green", "warning": "yellow", "missing": "bold red"}


def command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, for scripts.")
    ] = False,
) -> None:
    """Show what this machine has and what is missing, each with its remedy.

    Nothing is changed and no secret is shown. The exit status is 1 if something is missing that
    the project cannot do without, else 0.
    """
    with _quiet_logs(), console.status("looking around"):
        findings = list(examine())
    if as_json:
        typer.echo(json.dumps(report(findings), indent=2))
    else:
        _print_table(findings)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def report(findings: Sequence[Finding]) -> dict[str, object]:
    """The findings as plain data: `ok`, and one entry per finding."""
    return {
        "ok": all(finding.status != "missing" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep libraries from logging what the table says anyway."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _print_table(findings: Sequence[Finding]) -> None:
    out = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("what", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for section, group in groupby(findings, key=lambda finding: finding.section):
        table.add_row(Text(section, style="bold"))
        for finding in group:
            found = Text(finding.found)
            if finding.remedy:
                found.append(f"\n→ {finding.remedy}", style="italic")
            style = STYLES[finding.status]
            table.add_row(f"  {finding.name}", Text(finding.status, style=style), found)
        table.add_section()
    out.print(table)
    out.print(_verdict(findings))


def _verdict(findings: Sequence[Finding]) -> Text:
    missing = [finding.name for finding in findings if finding.status == "missing"]
    if missing:
        return Text(f"Missing: {', '.join(missing)}.", style=STYLES["missing"])
    warnings = sum(finding.status == "warning" for finding in findings)
    if warnings:
        noun = "warning" if warnings == 1 else "warnings"
        return Text(f"Everything needed is there, with {warnings} {noun}.", style=STYLES["warning"])
    return Text("Everything needed is there.", style=STYLES["ok"])


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
