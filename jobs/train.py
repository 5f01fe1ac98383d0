"""`streamdit train`: a streaming text-to-video model from a dataset directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from omegaconf import OmegaConf

from jobs.config import Layer, load_config, read_yaml
from jobs.options import (
    DEFAULT_PRESET,
    Address,
    ConfigFile,
    Dataset,
    Overrides,
    RunDirectory,
    same_settings,
)
from jobs.training_job import training_job
from streamdit.errors import UserError
from streamdit.io import read_model_config
from training.config import TrainConfig


def command(
    dataset: Dataset,
    overrides: Overrides = None,
    out: RunDirectory = Path("runs/train"),
    parent: Annotated[
        Path | None,
        typer.Option("--from", metavar="MODEL_DIR", help="Model directory to start from."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="Settings that ship with the package; default: small, or the recipe's own.",
        ),
    ] = None,
    config: ConfigFile = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE.yaml",
            help="Train in stages, each in OUT/STAGE from the model of the one before; "
            "STAGE.KEY=VALUE then sets one stage's settings.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=DIR",
            help="Data set that a recipe's stages call NAME; default: DATASET.",
        ),
    ] = None,
    redo: Annotated[
        str | None,
        typer.Option(
            "--redo",
            metavar="STAGE",
            help="Train this stage of the recipe and those after it again; nothing is deleted.",
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Train StreamDiT with mixed partitioning on a dataset of latents.

    Runs on Ray Train; under torchrun or Slurm (`torchrun -m jobs.train ...`) each process joins as
    a worker instead. The run can be interrupted: the same command continues from the newest
    checkpoint. The trained model is written to OUT/model and to the MLflow run.
    """
    from jobs.launch import launch, say_once

    if recipe is not None:
        from jobs.recipe import plan_stages, read_recipe, run_recipe

        if config is not None:
            raise UserError("--config does not go with --recipe; write a recipe FILE.yaml")
        stages = plan_stages(
            read_recipe(recipe),
            dataset,
            out,
            preset,
            overrides or (),
            _named(data or ()),
            parent_layers(parent),
        )
        model_directory = run_recipe(Path(recipe).stem, stages, out, parent, address, redo)
        say_once(f"model: {model_directory}")
        return
    if data or redo:
        raise UserError("--data and --redo speak of a recipe's stages; name it with --recipe")
    settings = load_config(
        TrainConfig,
        stage="train",
        preset=preset or DEFAULT_PRESET,
        file=config,
        overrides=overrides or (),
        more=parent_layers(parent, config, overrides or ()),
    )
    model_directory = launch(training_job(settings, dataset, out, parent), address)
    say_once(f"model: {model_directory}")
    more = same_settings("distill", preset)
    say_once(f"next: streamdit distill {dataset} --teacher {model_directory} --out DIR{more}")


def _named(arguments: Sequence[str]) -> dict[str, str]:
    """Data sets by name, from `NAME=DIR` each."""
    named = {}
    for argument in arguments:
        name, separator, directory = argument.partition("=")
        if not (name and separator and directory):
            raise UserError(f"--data {argument!r} is not of the form NAME=DIR")
        named[name] = directory
    return named


def parent_layers(
    parent: Path | None, file: Path | None = None, overrides: Sequence[str] = ()
) -> list[Layer]:
    """What a model directory to start from decides: its shape, whatever the preset's.

    Adapters also keep the partitions of the model that they are for.
    """
    if parent is None:
        return []
    known = read_model_config(parent)
    if known.distilled is not None:
        raise UserError(
            f"{parent} is distilled: it takes one step per chunk, which training would undo; train "
            "the model that it was distilled from, and distil the result"
        )
    keys = {"model"}
    asked = any(override.startswith("lora") for override in overrides)
    if asked or (file is not None and "lora" in read_yaml(file)):
        keys |= {"partition", "sampling"}
    values = known.model_dump(mode="json", include=keys)
    return [Layer(str(parent), OmegaConf.create(values), whole=True)]


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
