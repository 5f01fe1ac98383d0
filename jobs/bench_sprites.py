"""`streamdit bench sprites`: what distillation keeps, where the right answer is known.

The work is in :mod:`jobs.sprite_bench`, which needs the libraries of the whole path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import ConfigFile, Overrides


def command(
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Models, report and plot go here.")
    ] = Path("runs/bench-sprites"),
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME", help="demo (two CPU cores) or large (GPU).")
    ] = "demo",
    teacher: Annotated[
        list[Path] | None,
        typer.Option(
            "--teacher",
            metavar="MODEL_DIR",
            help="Teacher; repeat it, with its student, for further trainings; default: train one "
            "for every seed.",
        ),
    ] = None,
    student: Annotated[
        list[Path] | None,
        typer.Option(
            "--student",
            metavar="MODEL_DIR",
            help="Its student, which goes with --teacher; default: distil one.",
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Compare teacher and student on a made-up world whose videos can be marked exactly.

    The full teacher (its 128 steps with guidance), the same teacher at the student's few steps
    without guidance (what one would get without distilling), and the student make videos from the
    same prompts and noise. Writes OUT/report.md, report.json, report.svg and scores.json. Can be
    interrupted: finished models and videos are kept.

    KEY=VALUE sets the benchmark's own keys (`prompts=16`, `seeds=2`) or those of a stage
    (`train.steps=200`). With given models only their world can be set (`world.held_out=32`): what
    it held out is what they are asked for.
    """
    from jobs.sprite_bench import run

    run(overrides or (), out, preset, config, teacher or (), student or ())
