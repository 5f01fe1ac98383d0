"""`streamdit select`: choose which clips of a dataset are trained on."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.console import say
from pipeline.lock import writing
from pipeline.reselect import Choice, preview, reselect
from streamdit.errors import UserError


def command(
    dataset: Annotated[
        str,
        typer.Argument(metavar="DATASET", help="Dataset directory or s3:// prefix."),
    ],
    expression: Annotated[
        str,
        typer.Argument(
            metavar="EXPRESSION",
            help="Condition over clip columns and scores, such as "
            "'motion > 0.3 and text_area < 0.05 and not duplicate'.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count only; the dataset stays as it is.")
    ] = False,
) -> None:
    """Choose which clips are trained on, by an expression; takes seconds.

    Shows how many clips each condition drops, and writes the next version of the selection.
    Scores that were not measured are null: a condition on them keeps no clip; ask for them with
    `is None`. Nothing is encoded: clips that no selection so far has kept need `streamdit ingest`
    with the same selection.expression.
    """
    if dry_run:
        choose(dataset, expression, dry_run)
        return
    with writing(dataset, "streamdit select", say):
        choose(dataset, expression)


def choose(dataset: str, expression: str, dry_run: bool = False) -> None:
    """Show what `expression` keeps and drops, and publish it unless `dry_run`.

    Raises:
        UserError: if it is wrong or keeps nothing, or the dataset is not encoded.
    """
    choice = preview(dataset, expression)
    console = Console(highlight=False)
    console.print(choice_table(choice))
    kept = f"{choice.selected:,} of {choice.clips:,} clips"
    if dry_run:
        console.print(f"{kept} would be kept; nothing is written")
        return
    if not choice.selected:
        raise UserError(f"selection {expression!r} keeps no clip of {dataset}: loosen it")
    index = reselect(dataset, expression)
    console.print(
        f"{kept} kept; selection version {index.version} holds {index.rows:,}, "
        f"{index.held_out:,} of them held out"
    )
    if missing := choice.selected - index.rows:
        console.print(
            f"{missing:,} have no latents yet: run `streamdit ingest --only encode` with "
            "selection.expression set to this",
            style="yellow",
        )


def choice_table(choice: Choice) -> Table:
    """What each condition drops, as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("condition", overflow="fold")
    for name in ("drops", "only it drops", "has no value"):
        table.add_column(name, justify="right", no_wrap=True)
    for clause in choice.clauses:
        numbers = (clause.drops, clause.alone, clause.unknown)
        table.add_row(Text(clause.text), *(f"{number:,}" for number in numbers))
    return table


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
