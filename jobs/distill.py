"""`streamdit distill`: a model that needs one evaluation per chunk and no guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillation.config import DistillConfig
from distillation.job import DistillationJob
from distillation.objective import make_objective
from distillation.plan import RolloutPlan, per_segment
from jobs.config import load_config
from jobs.options import (
    DEFAULT_PRESET,
    Address,
    ConfigFile,
    Dataset,
    Overrides,
    Preset,
    RunDirectory,
)
from jobs.training_job import check_dataset
from pipeline.store import DatasetPath, open_store
from streamdit.config import (
    DistillationRecord,
    DistilledScheme,
    PartitionConfig,
    PartitionEntry,
    SamplingConfig,
    StartKind,
)
from streamdit.errors import UserError
from streamdit.io import read_model_config
from streamdit.partition import PartitionMixture, PartitionScheme
from streamdit.schemes import behind_references, fills_behind_references
from training.job import TrainJob


def command(
    dataset: Dataset,
    overrides: Overrides = None,
    teacher: Annotated[
        Path,
        typer.Option("--teacher", metavar="MODEL_DIR", help="Model directory of the teacher."),
    ] = Path("runs/train/model"),
    out: RunDirectory = Path("runs/distill"),
    preset: Preset = DEFAULT_PRESET,
    config: ConfigFile = None,
    rollouts: Annotated[
        str | None,
        typer.Option(
            "--rollouts",
            metavar="DIR",
            help="Teacher rollouts from `streamdit rollouts`, a folder or s3://bucket/prefix; the "
            "teacher then stays out of memory.",
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Distil a trained model: many guided steps per chunk become one step without guidance.

    The student starts from the teacher and learns the average velocity of the teacher's guided
    walk across each noise segment. The student's model directory is OUT/model.
    """
    from jobs.launch import launch, say_once

    changes = list(overrides or ())
    if rollouts is not None:
        changes.append(f"rollouts={open_store(rollouts).root}")
    settings = load_config(
        DistillConfig, stage="distill", preset=preset, file=config, overrides=changes
    )
    model_directory = launch(distillation_job(settings, dataset, teacher, out), address)
    say_once(f"model: {model_directory}")
    say_once(f"next: streamdit register {model_directory} --name NAME --alias ALIAS")


def distillation_job(
    config: DistillConfig, dataset: DatasetPath, teacher: Path, out: Path, name: str = "distill"
) -> TrainJob:
    """The job that `streamdit distill` runs.

    Raises:
        UserError: if the teacher was not trained on the student's partition.
    """
    check_dataset(dataset)
    parent = read_model_config(teacher)
    plan = teacher_plan(config, teacher)
    scheme = plan.scheme
    starts: dict[str, StartKind] = {"uniform": "text-to-video", "ramp": "ramp"}
    taught = tuple(start for kind, start in starts.items() if kind in plan.buffer_kinds)
    return DistillationJob(
        config=config,
        model=parent.model,
        partition=PartitionConfig(
            entries=(PartitionEntry(chunk_frames=scheme.c, reference_frames=scheme.K),),
            gamma=parent.partition.gamma,
            sigma_min=parent.partition.sigma_min,
        ),
        sampling=SamplingConfig(
            chunk_frames=scheme.c, reference_frames=scheme.K, micro_steps=1, start=taught[0]
        ),
        dataset=open_store(dataset).root,
        out=str(out.resolve()),
        make_objective=make_objective,
        run_name=name,
        parent=str(teacher.resolve()),
        tags={"stage": "distill", "teacher": str(teacher)},
        distilled=DistillationRecord(
            schemes=(DistilledScheme(chunk_frames=scheme.c, reference_frames=scheme.K),),
            starts=taught,
            continues="continued" in plan.buffer_kinds,
            teacher_sha256=parent.weights_sha256,
            teacher_micro_steps=scheme.s,
            teacher_guidance_scale=sum(plan.guidance) / len(plan.guidance),
            teacher_guidance_by_segment=plan.guidance if len(set(plan.guidance)) > 1 else (),
        ),
    )


def teacher_plan(config: DistillConfig, teacher: Path) -> RolloutPlan:
    """What a configuration asks of a teacher.

    Raises:
        UserError: if the teacher cannot give it.
    """
    parent = read_model_config(teacher)
    if parent.distilled is not None:
        raise UserError(
            f"{teacher} is distilled already and takes no micro steps; give the model that it was "
            "distilled from"
        )
    plan = RolloutPlan.make(config.teacher, parent, config.drift)
    mixture = PartitionMixture(parent.partition, parent.model.buffer_frames)
    check_in_mix(plan.scheme, mixture, str(teacher))
    if "uniform" in plan.buffer_kinds and not mixture.makes_first_video:
        raise UserError(
            f"teacher.uniform_share asks {teacher} for ordinary text-to-video, which its training "
            "mix lacks; set teacher.uniform_share=0 and teacher.ramp_share=0.2"
        )
    if "continued" in plan.buffer_kinds and not fills_behind_references(parent, plan.scheme):
        raise UserError(
            f"teacher.continued_share asks {teacher} to fill its buffer behind given references, "
            f"which its training mix lacks; train it with {behind_references(plan.scheme)} in "
            "partition.entries too, or set teacher.continued_share=0"
        )
    if config.segment_weights is not None:
        per_segment(config.segment_weights, plan.scheme, "segment_weights")
    return plan


def check_in_mix(scheme: PartitionScheme, mixture: PartitionMixture, teacher: str) -> None:
    """Refuse a scheme that a teacher has not been trained on.

    Raises:
        UserError: with those that it has.
    """
    if not mixture.serves(scheme):
        raise UserError(
            f"teacher.chunk_frames {scheme.c} with K = {scheme.K} was not in the training mix of "
            f"{teacher}; choose one of {mixture.describe()}"
        )


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
