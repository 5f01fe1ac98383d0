"""`streamdit distill`: a model that needs one evaluation per chunk and no guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillation.config import DistillConfig
from distillation.objective import make_objective
from jobs.config import load_config
from jobs.options import Address, ConfigFile, Dataset, Overrides, Preset, RunDirectory
from jobs.train import check_dataset
from streamdit.config import PartitionConfig, PartitionEntry, SamplingConfig
from streamdit.errors import UserError
from streamdit.io import read_model_config
from streamdit.partition import PartitionMixture, PartitionScheme
from training.job import TrainJob


def command(
    dataset: Dataset,
    overrides: Overrides = None,
    teacher: Annotated[
        Path,
        typer.Option("--teacher", metavar="MODEL_DIR", help="Model directory of the teacher."),
    ] = Path("runs/train/model"),
    out: RunDirectory = Path("runs/distill"),
    preset: Preset = "default",
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Distil a trained model: many guided steps per chunk become one step without guidance.

    The student starts from the teacher and learns the average velocity of the teacher's guided
    walk across each noise segment. The student's model directory is OUT/model.
    """
    from jobs.launch import launch, say_once

    settings = load_config(
        DistillConfig, stage="distill", preset=preset, file=config, overrides=overrides or ()
    )
    model_directory = launch(distillation_job(settings, dataset, teacher, out), address)
    say_once(f"model: {model_directory}")
    say_once(f"next: streamdit register {model_directory} --name NAME --alias ALIAS")


def distillation_job(
    config: DistillConfig, dataset: Path, teacher: Path, out: Path, name: str = "distill"
) -> TrainJob:
    """The job that `streamdit distill` runs.

    Raises:
        UserError: if the teacher was not trained on the student's partition.
    """
    check_dataset(dataset)
    parent = read_model_config(teacher)
    frames = parent.model.buffer_frames
    settings = config.teacher
    scheme = PartitionScheme.for_buffer(
        frames, settings.chunk_frames, settings.micro_steps, settings.reference_frames
    )
    mixture = PartitionMixture(parent.partition, frames)
    if not mixture.serves(scheme):
        raise UserError(
            f"teacher.chunk_frames {scheme.c} with K = {scheme.K} was not in the training mix of "
            f"{teacher}; choose one of {mixture.describe()}"
        )
    entry = PartitionEntry(
        chunk_frames=settings.chunk_frames, reference_frames=settings.reference_frames
    )
    return TrainJob(
        config=config,
        model=parent.model,
        partition=PartitionConfig(
            entries=(entry,),
            gamma=parent.partition.gamma,
            sigma_min=parent.partition.sigma_min,
        ),
        sampling=SamplingConfig(
            chunk_frames=settings.chunk_frames,
            reference_frames=settings.reference_frames,
            micro_steps=1,
            guidance_scale=1.0,
        ),
        dataset=str(dataset.resolve()),
        out=str(out.resolve()),
        make_objective=make_objective,
        run_name=name,
        parent=str(teacher.resolve()),
        tags={"stage": "distill", "teacher": str(teacher)},
    )


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
