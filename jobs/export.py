"""`streamdit export`: any checkpoint of a run as a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.console import say
from streamdit.errors import UserError


def command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Directory of a run: what --out named in training."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Model directory to write.")],
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", help="Which checkpoint; default: the newest."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="ema|raw",
            help="Averaged weights or those of the step; default: averaged if there are any.",
        ),
    ] = None,
) -> None:
    """Turn a checkpoint of a training run into a model directory that streams.

    Needs no GPU and no other workers, however many saved the checkpoint, and memory for two copies
    of the weights. A fine-tuned model is written with its adapters merged in.
    """
    from training.export import export_checkpoint

    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights} is not known; choose ema or raw")
    facts = export_checkpoint(run, out, step, weights)  # type: ignore[arg-type]
    say(f"model: {out} (step {facts.step}, saved by {facts.world_size} workers)")
    say(f'next: streamdit generate {out} --prompt "..." --out video.mp4')


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
