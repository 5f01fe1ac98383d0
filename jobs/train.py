"""`streamdit train`: a streaming text-to-video model from a dataset directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.config import load_config
from jobs.console import say
from jobs.options import ConfigFile, Overrides, Preset
from streamdit.errors import UserError
from training.config import TrainConfig
from training.job import TrainJob
from training.objective import make_flow_matching


def command(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Dataset directory from `streamdit ingest`.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the run.")] = Path(
        "runs/train"
    ),
    parent: Annotated[
        Path | None,
        typer.Option("--from", metavar="MODEL_DIR", help="Model directory to start from."),
    ] = None,
    preset: Preset = "small",
    config: ConfigFile = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", help="Ray cluster; default: here.")
    ] = None,
) -> None:
    """Train StreamDiT with mixed partitioning on a dataset of latents.

    Runs on Ray Train; under torchrun or Slurm (`torchrun -m jobs.train ...`) each process joins as
    a worker instead. The run can be interrupted: the same command continues from the newest
    checkpoint. The trained model is written to OUT/model and to the MLflow run.
    """
    from jobs.launch import launch

    settings = load_config(
        TrainConfig, stage="train", preset=preset, file=config, overrides=overrides or ()
    )
    model_directory = launch(training_job(settings, dataset, out, parent), address)
    say(f"model: {model_directory}")
    say(f"next: streamdit distill {dataset} --teacher {model_directory} --out DIR")


def training_job(
    config: TrainConfig, dataset: Path, out: Path, parent: Path | None = None, name: str = "train"
) -> TrainJob:
    """The job that `streamdit train` runs."""
    check_dataset(dataset)
    return TrainJob(
        config=config,
        model=config.model,
        partition=config.partition,
        sampling=config.sampling,
        dataset=str(dataset.resolve()),
        out=str(out.resolve()),
        make_objective=make_flow_matching,
        run_name=name,
        parent=str(parent.resolve()) if parent else None,
        tags={"stage": "train"},
    )


def check_dataset(dataset: Path) -> None:
    """Refuse a path that is no dataset before any worker starts."""
    if not dataset.is_dir():
        raise UserError(
            f"dataset {dataset} does not exist; make one with `streamdit ingest VIDEOS --out "
            f"{dataset} --autoencoder DIR`"
        )
    from pipeline.schema import load_manifest

    load_manifest(dataset)


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
