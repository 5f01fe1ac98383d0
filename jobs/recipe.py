"""Run a recipe: every stage in order, each from the model of the one before.

A stage is an ordinary run in a directory of its own, so an interrupted recipe continues wherever
it stood: finished stages are recognised by their fingerprint, the unfinished one by its newest
checkpoint. One MLflow run stands above those of the stages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from distillation.config import DistillConfig
from jobs.config import Layer, available_presets, load_config, read_preset, read_yaml
from jobs.console import console, say
from jobs.distill import check_in_mix, distillation_job
from jobs.launch import (
    catch_up,
    finished,
    is_main_process,
    launch,
    number_of_workers,
    say_once,
)
from jobs.runtime import ray_runtime
from jobs.training_job import check_dataset, training_job
from pipeline.lock import writing
from pipeline.store import DatasetPath
from streamdit.errors import UserError
from streamdit.files import replace_text
from streamdit.io import read_model_config
from streamdit.partition import PartitionMixture, PartitionScheme
from training.config import RunConfig, TrainConfig
from training.engine import join_world, wait_for_all
from training.job import TrainJob, difference
from training.recipe import RecipeConfig, StageConfig
from training.tracking import Tracker

SCHEMAS: dict[str, type[RunConfig]] = {"train": TrainConfig, "distill": DistillConfig}
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Stage:
    """A stage with everything about it settled."""

    name: str
    config: RunConfig
    dataset: DatasetPath
    out: Path

    def job(self, parent: Path | None) -> TrainJob:
        """The run of this stage, from the model directory of the one before."""
        if isinstance(self.config, DistillConfig):
            assert parent is not None
            return distillation_job(self.config, self.dataset, parent, self.out, self.name)
        assert isinstance(self.config, TrainConfig)
        return training_job(self.config, self.dataset, self.out, parent, self.name)


def read_recipe(source: str) -> RecipeConfig:
    """A recipe by its shipped name, or from a YAML file.

    Raises:
        UserError: if there is none, or it does not fit.
    """
    is_file, known = source.endswith((".yaml", ".yml")), available_presets("recipe")
    if not is_file and source not in known:
        raise UserError(
            f"there is no recipe {source!r}: choose one of {', '.join(known)}, or give a FILE.yaml"
        )
    values = read_yaml(Path(source)) if is_file else read_preset("recipe", source)
    try:
        # Interpolations stay: they mean the settings of the stage that they end up in.
        return RecipeConfig.model_validate(OmegaConf.to_container(values, resolve=False))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"recipe {source}: {key}: {first['msg']}; see {RecipeConfig.__module__} for its keys"
        ) from None


def plan_stages(
    recipe: RecipeConfig,
    dataset: DatasetPath,
    out: Path,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    datasets: Mapping[str, DatasetPath] | None = None,
    parent: Sequence[Layer] = (),
) -> list[Stage]:
    """Settle every stage before the first one starts.

    Args:
        recipe: the stages.
        dataset: data set of every stage that names none, or one without a directory.
        out: directory of the recipe; each stage gets a folder in it.
        preset: takes the place of the recipe's own preset.
        overrides: `key=value` for every stage that has such a setting, `STAGE.key=value` for one.
        datasets: directories by the names that stages call them.
        parent: what a model to start from decides, over the preset.

    Raises:
        UserError: if any stage's settings do not fit, or their models differ in shape.
    """
    _check_names(recipe)
    datasets = dict(datasets or {})
    for directory in {dataset, *datasets.values()}:
        check_dataset(directory)
    names = {stage.dataset for stage in recipe.stages if stage.dataset}
    unknown = sorted(set(datasets) - names)
    if unknown:
        raise UserError(
            f"no stage asks for a data set {unknown[0]!r}; the recipe knows "
            f"{', '.join(sorted(names)) or 'no names, give one DATASET only'}"
        )
    stages = [
        Stage(
            stage.name,
            _stage_config(recipe, stage, preset, overrides, parent),
            datasets.get(stage.dataset or "", dataset),
            out / stage.name,
        )
        for stage in recipe.stages
    ]
    _check_shapes(stages)
    for stage in stages:
        _check_batch(stage)
    return stages


def _stage_config(
    recipe: RecipeConfig,
    stage: StageConfig,
    preset: str | None,
    overrides: Sequence[str],
    parent: Sequence[Layer],
) -> RunConfig:
    """Preset, then the recipe, then the stage, then the command line: for all, for this one."""
    layers = [Layer(f"stage {stage.name} of the recipe", OmegaConf.create(stage.settings))]
    if stage.kind == "train":
        layers = [*parent, Layer("the recipe", OmegaConf.create(recipe.settings)), *layers]
    return load_config(
        SCHEMAS[stage.kind],
        stage=stage.kind,
        preset=preset or stage.preset or recipe.preset,
        overrides=_overrides_of(stage, recipe, overrides),
        more=layers,
    )


def _overrides_of(stage: StageConfig, recipe: RecipeConfig, overrides: Sequence[str]) -> list[str]:
    """Overrides that concern a stage, those for it alone last."""
    names = {other.name for other in recipe.stages}
    mine = set(SCHEMAS[stage.kind].model_fields)
    known = {key for other in recipe.stages for key in SCHEMAS[other.kind].model_fields}
    for_all, for_one = [], []
    for override in overrides:
        head, _, rest = override.partition(".")
        key = override.partition("=")[0].partition(".")[0]
        if head in names and rest:
            if head == stage.name:
                for_one.append(rest)
        elif key in mine or key not in known:
            for_all.append(override)
    return for_all + for_one


def _check_names(recipe: RecipeConfig) -> None:
    """`NAME.key=value` must mean either a stage or a setting."""
    settings = {key for schema in SCHEMAS.values() for key in schema.model_fields}
    for stage in recipe.stages:
        if stage.name in settings:
            raise UserError(
                f"stage {stage.name} is named like a setting; give it another name, so that "
                f"{stage.name}.KEY=VALUE means one thing"
            )


def _check_shapes(stages: Sequence[Stage]) -> None:
    """Every stage continues the model of the one before, so all have one shape."""
    first = stages[0]
    if not isinstance(first.config, TrainConfig):
        raise UserError(
            f"stage {first.name} distils, but nothing comes before it; begin with a stage of kind "
            "train, or use `streamdit distill`"
        )
    for before, stage in pairwise(stages):
        if isinstance(before.config, DistillConfig):
            raise UserError(
                f"stage {stage.name} goes on from what stage {before.name} distilled, and would "
                "undo it; let one distillation be the last stage"
            )
        if isinstance(before.config, TrainConfig) and isinstance(stage.config, DistillConfig):
            _check_teacher(before, before.config, stage.config)
    for stage in stages:
        if isinstance(stage.config, TrainConfig) and stage.config.model != first.config.model:
            raise UserError(
                f"stage {stage.name} has a model of another shape than stage {first.name}; set "
                "model in the recipe's own settings, not in a stage's"
            )


def _check_teacher(before: Stage, trained: TrainConfig, asked: DistillConfig) -> None:
    """The stage before must be trained on what the student takes from it."""
    teacher, frames = asked.teacher, trained.model.buffer_frames
    scheme = PartitionScheme.for_buffer(
        frames, teacher.chunk_frames, teacher.micro_steps, teacher.reference_frames
    )
    check_in_mix(scheme, PartitionMixture(trained.partition, frames), f"stage {before.name}")


def _check_batch(stage: Stage) -> None:
    """The workers must have equal shares of it."""
    try:
        stage.config.accumulation(number_of_workers(stage.config))
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def run_recipe(
    name: str,
    stages: Sequence[Stage],
    out: Path,
    parent: Path | None = None,
    address: str | None = None,
    redo: str | None = None,
) -> Path:
    """Run the stages that are not finished; returns the last one's model directory.

    Args:
        name: name of the MLflow run above the stages'.
        stages: from :func:`plan_stages`.
        out: directory of the recipe.
        parent: model directory that the first stage starts from.
        address: Ray cluster.
        redo: stage to train again, with all after it; what they made is kept under another name.

    Raises:
        UserError: if a stage has been trained with other settings.
    """
    first = stages[0].config
    assert isinstance(first, TrainConfig)
    if parent is not None and read_model_config(parent).model != first.model:
        raise UserError(
            f"{parent} holds a model of another shape than the recipe's settings ask for; leave "
            "`model` out of them"
        )
    alone = writing(str(out), f"streamdit train --recipe {name}", say)
    with alone if is_main_process() else nullcontext(), _workers(address) as barrier:
        if redo is not None:
            if is_main_process():
                _set_aside(stages, redo)
            barrier()
        _check_done(stages, parent)
        if is_main_process():
            console.print(_plan(stages))
        with _parent_run(name, stages, out) as run_id:
            for number, stage in enumerate(stages, 1):
                job = stage.job(parent)
                _check_unchanged(stage, job)
                parent = job.model_directory
                if finished(job):
                    catch_up(job)
                    continue
                say_once(f"stage {number}/{len(stages)}: {stage.name}")
                if is_main_process():
                    _record(stage, job)
                # The recipe's own run is there, so the store is the right one; what matters now is
                # that training goes on while it is away.
                tags = job.tags | _tags(name, run_id)
                launch(replace(job, tags=tags, store_may_be_away=True), address)
                barrier()
    assert parent is not None
    return parent


@contextmanager
def _workers(address: str | None) -> Iterator[Any]:
    """One Ray runtime, or one process group, for all stages; yields a barrier for all workers."""
    if "RANK" not in os.environ:
        with ray_runtime(address):
            yield lambda: None
        return
    join_world()
    yield wait_for_all


def _set_aside(stages: Sequence[Stage], redo: str) -> None:
    """Move a stage and all that came of it out of the way."""
    names = [stage.name for stage in stages]
    if redo not in names:
        raise UserError(f"no stage is named {redo!r}; choose one of {', '.join(names)}")
    for stage in stages[names.index(redo) :]:
        if stage.out.exists():
            taken = [
                int(path.suffix[1:])
                for path in stage.out.parent.glob(f"{stage.name}.*")
                if path.suffix[1:].isdigit()
            ]
            kept = stage.out.with_name(f"{stage.name}.{max(taken, default=0) + 1}")
            stage.out.rename(kept)
            say_once(f"stage {stage.name}: what it made is kept in {kept}")


def _check_done(stages: Sequence[Stage], parent: Path | None) -> None:
    """Refuse changed settings of finished stages before anything runs."""
    for stage in stages:
        job = stage.job(parent)
        _check_unchanged(stage, job)
        if not job.finished():
            return
        parent = job.model_directory


def _check_unchanged(stage: Stage, job: TrainJob) -> None:
    recorded = stage.out / SETTINGS_FILE
    if not recorded.is_file() or (before := json.loads(recorded.read_text())) == job.identity():
        return
    raise UserError(
        f"stage {stage.name} in {stage.out} was trained with {difference(before, job.identity())};"
        f" restore that, or train the stage and those after it again with --redo {stage.name}"
    )


def _record(stage: Stage, job: TrainJob) -> None:
    """Note what the stage is trained with, for whoever runs the recipe next."""
    replace_text(stage.out / SETTINGS_FILE, json.dumps(job.identity(), indent=2) + "\n")


def _tags(recipe: str, run_id: str | None) -> dict[str, str]:
    tags = {"recipe": recipe}
    return tags | {"mlflow.parentRunId": run_id} if run_id else tags


@contextmanager
def _parent_run(name: str, stages: Sequence[Stage], out: Path) -> Iterator[str | None]:
    """The MLflow run above those of the stages; None in processes that do not log."""
    if not is_main_process():
        yield None
        return
    known = out / "recipe.json"
    run_id = json.loads(known.read_text())["run_id"] if known.is_file() else None
    tracker = Tracker.start(
        stages[0].config.tracking,
        name,
        params={"stages": ", ".join(stage.name for stage in stages)},
        tags={"stage": "recipe"},
        run_id=run_id,
    )
    replace_text(known, json.dumps({"run_id": tracker.run_id}) + "\n")
    try:
        yield tracker.run_id
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish()


def _plan(stages: Sequence[Stage]) -> Any:
    """Table of what will be done."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "state"):
        table.add_column(heading)
    for heading in ("steps", "clips per step", "learning rate"):
        table.add_column(heading, justify="right")
    table.add_column("data set", overflow="fold")
    for stage in stages:
        config = stage.config
        done = (stage.out / "model").is_dir()
        begun = (stage.out / "checkpoints").is_dir()
        table.add_row(
            stage.name,
            "finished" if done else "begun" if begun else "to do",
            f"{config.steps:,}",
            f"{config.global_batch:,}",
            f"{config.optimizer.learning_rate:g}",
            str(stage.dataset),
        )
    return table
