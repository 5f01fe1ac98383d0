"""`streamdit rollouts`: teacher rollouts as Parquet, for distilling without the teacher."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from distillation.config import DistillConfig
from jobs.config import load_config
from jobs.console import OnProgress, format_duration, progress, say
from jobs.distill import teacher_plan
from jobs.launch import check_resources
from jobs.options import (
    DEFAULT_PRESET,
    Address,
    ConfigFile,
    Dataset,
    Overrides,
    Preset,
    same_settings,
)
from jobs.runtime import ray_runtime
from jobs.training_job import check_dataset
from pipeline.lock import writing
from pipeline.store import DatasetPath, Store, open_store
from streamdit.errors import UserError
from streamdit.io import read_model_config
from training.config import LaunchConfig

REQUEST_FILE = "request.json"
CLIPS_PER_FILE = 32
PATIENCE_S = 60.0
"""How long nothing may happen before it is said that a cluster starts no actor."""
LONG_S = 600.0
"""How long actors may work before it is said that none of them has finished anything."""


@dataclass(frozen=True)
class Unit:
    """The clips of one file: some of one bucket, each with its rollout of one number."""

    split: str
    bucket: str
    positions: tuple[int, ...]
    number: int

    @property
    def file(self) -> str:
        """Its name; the same clips and number always have the same."""
        return (
            f"rollouts-{self.number:03d}-{self.split}-{self.bucket}-{self.positions[0]:07d}.parquet"
        )


def command(
    dataset: Dataset,
    overrides: Overrides = None,
    teacher: Annotated[
        Path,
        typer.Option("--teacher", metavar="MODEL_DIR", help="Model directory of the teacher."),
    ] = Path("runs/train/model"),
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="DIR", help="Where the rollouts go: a folder, or s3://bucket/prefix."
        ),
    ] = "runs/rollouts",
    per_clip: Annotated[int, typer.Option("--per-clip", min=1, help="Rollouts of each clip.")] = 8,
    preset: Preset = DEFAULT_PRESET,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Let a teacher walk buffers of every clip, and keep what a student shall learn from it.

    Takes the settings of `streamdit distill`; launch.workers and launch.use_gpu say how many Ray
    actors hold a teacher. Can be interrupted: the same command makes what is missing. A larger
    --per-clip adds to what is there.
    """
    settings = load_config(
        DistillConfig, stage="distill", preset=preset, file=config, overrides=overrides or ()
    )
    check_dataset(dataset)
    own_runtime = not (address or os.environ.get("RAY_ADDRESS"))
    with ray_runtime(address), progress("rollouts", unit="clips") as shown:
        count = make_rollouts(dataset, teacher, out, settings, per_clip, shown, own_runtime)
    say(f"rollouts: {out} ({count} of {per_clip} per clip)")
    more = same_settings("distill", preset, config, overrides or ())
    say(f"next: streamdit distill {dataset} --teacher {teacher} --rollouts {out} --out DIR{more}")


def make_rollouts(
    dataset: DatasetPath,
    teacher: Path,
    out: DatasetPath,
    config: DistillConfig,
    per_clip: int,
    on_progress: OnProgress | None = None,
    own_runtime: bool = False,
) -> int:
    """Write the rollouts that are missing, on Ray actors, then the manifest.

    Args:
        dataset: whose clips are noised.
        teacher: model directory.
        out: where the files go: an `s3://` prefix, or a folder on storage that all nodes share.
        config: of the distillation.
        per_clip: rollouts of each clip.
        on_progress: told of clips done.
        own_runtime: whether Ray runs for this call alone and will never have more nodes, so that
            actors it has no room for are an error.

    Returns:
        Rollouts in the directory.

    Raises:
        UserError: if the directory holds rollouts of something else, the teacher does not fit, the
            actors cannot be placed, or their files do not arrive.
    """
    if config.drift.needs_teacher or config.drift.needs_student:
        raise UserError("rollouts come from noised clips; leave out the drift settings")
    store = open_store(out)
    with writing(out, "streamdit rollouts", say):
        return _make_missing(dataset, teacher, store, config, per_clip, on_progress, own_runtime)


def _make_missing(
    dataset: DatasetPath,
    teacher: Path,
    store: Store,
    config: DistillConfig,
    per_clip: int,
    on_progress: OnProgress | None,
    own_runtime: bool,
) -> int:
    """See :func:`make_rollouts`; nobody else writes to the directory meanwhile."""
    import ray

    from distillation.cache import MANIFEST_FILE, RolloutManifest, plan_record
    from pipeline.schema import load_manifest
    from training.data import LatentDataset

    parent = read_model_config(teacher)
    for split in ("train", "held_out"):
        data = LatentDataset(dataset, split)
        if len(data) or split == "train":
            data.check_fits(parent.model)
            data.check_continues(parent)
    record = {
        "teacher_sha256": parent.weights_sha256,
        "dataset_fingerprint": load_manifest(dataset).fingerprint,
        "plan": plan_record(teacher_plan(config, teacher)),
        "seed": config.seed,
        "precision": config.precision,
    }
    _claim(store, record)
    units = plan_units(dataset, per_clip)
    missing = _missing(store, units)
    launch, workers = config.launch, min(config.launch.workers, len(missing))
    if own_runtime:
        needed = {"CPU": float(launch.cpus_per_worker), "GPU": float(launch.use_gpu)}
        check_resources(needed, workers, ray.cluster_resources())
    actors = [
        ray.remote(num_cpus=launch.cpus_per_worker, num_gpus=int(launch.use_gpu), max_restarts=2)(
            RolloutActor
        ).remote(open_store(dataset).root, str(teacher.resolve()), store.root, config)
        for _ in range(workers)
    ]
    total = sum(len(unit.positions) for unit in units)
    done = total - sum(len(unit.positions) for unit in missing)
    for unit in _work_off(actors, missing, launch):
        done += len(unit.positions)
        if on_progress is not None:
            on_progress(done, total, {})
    if lacking := _missing(store, units):
        raise UserError(
            f"{store.uri(lacking[0].file)} (and {len(lacking) - 1} more) was made but is not "
            "there: the actors run on nodes that do not share this folder; put --out on storage "
            "that all nodes share, or on S3"
        )
    manifest = RolloutManifest(
        **record, per_clip=per_clip, files=tuple(unit.file for unit in units)
    )
    store.write_text(MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return total


def _claim(store: Store, request: dict[str, Any]) -> None:
    """Refuse a directory that holds rollouts of another request; else say whose it is."""
    if store.create_text(REQUEST_FILE, json.dumps(request, indent=2, sort_keys=True) + "\n"):
        return
    there = json.loads(store.read_text(REQUEST_FILE))
    if there != request:
        differs = next(name for name, value in request.items() if there.get(name) != value)
        raise UserError(
            f"{store.root} holds rollouts with another {differs}; give another --out, or remove "
            f"{store.root}"
        )


def _missing(store: Store, units: Sequence[Unit]) -> list[Unit]:
    """Those whose file is not there."""
    there = store.files()
    return [unit for unit in units if unit.file not in there]


def plan_units(dataset: DatasetPath, per_clip: int) -> list[Unit]:
    """All files that a data set's rollouts take, of both splits."""
    from training.data import LatentDataset

    units = []
    for split in ("train", "held_out"):
        for bucket, positions in LatentDataset(dataset, split).buckets.items():
            parts = range(0, len(positions), CLIPS_PER_FILE)
            units += [
                Unit(split, bucket, tuple(positions[first : first + CLIPS_PER_FILE]), number)
                for number in range(per_clip)
                for first in parts
            ]
    return units


def _work_off(actors: Sequence[Any], units: Sequence[Unit], launch: LaunchConfig) -> Iterator[Unit]:
    """Give every actor one unit at a time, once it is up; yields the units as they are done.

    A cluster may have no room for some of the actors yet, or ever: the others do their part. One
    with nothing left to do leaves its room to those that lost theirs with a unit in hand.
    """
    import ray

    waiting = list(reversed(units))
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}
    running: dict[Any, tuple[Any, Unit]] = {}
    while waiting or running:
        since = time.monotonic()
        while not (ready := ray.wait([*starting, *running], num_returns=1, timeout=PATIENCE_S)[0]):
            if not running:
                say(_why_none_starts(len(starting), launch))
            elif (quiet_s := time.monotonic() - since) > LONG_S:
                since = time.monotonic()
                say(
                    f"no rollouts were finished for {format_duration(quiet_s)}: {len(running)} "
                    "units are under way, or wait for an actor that Ray starts again"
                )
        (finished,) = ready
        ray.get(finished)
        if finished in starting:
            actor, done = starting.pop(finished), None
        else:
            actor, done = running.pop(finished)
        if waiting:
            following = waiting.pop()
            task = actor.make.options(max_task_retries=2).remote(following)
            running[task] = (actor, following)
        else:
            ray.kill(actor)
        if not waiting:
            for pending in starting.values():
                ray.kill(pending)
            starting.clear()
        if done is not None:
            yield done


def _why_none_starts(actors: int, launch: LaunchConfig) -> str:
    """What actors need, and what the cluster has."""
    import ray

    def resources(values: dict[str, float]) -> str:
        return " and ".join(f"{values.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))

    needed = resources({"CPU": launch.cpus_per_worker, "GPU": launch.use_gpu})
    return (
        f"none of {actors} actors is up yet: each takes {needed}; the cluster has "
        f"{resources(ray.cluster_resources())}, of which {resources(ray.available_resources())} "
        "are free now (an actor that has its place may still load the teacher)"
    )


class RolloutActor:
    """Holds a teacher and makes units. Runs in a Ray worker."""

    def __init__(self, dataset: str, teacher: str, out: str, config: DistillConfig) -> None:
        import torch

        from distillation.rollout import LiveRollouts
        from distillation.teacher import load_teacher
        from training.data import LatentDataset

        torch.set_num_threads(config.launch.cpus_per_worker)
        self.device = torch.device("cuda" if config.launch.use_gpu else "cpu")
        self.dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self.config, self.store = config, open_store(out)
        whole = config.teacher.model_copy(update={"placement": "replicated"})
        plan = teacher_plan(config, Path(teacher))
        self.rollouts = LiveRollouts(
            load_teacher(teacher, config.model_copy(update={"teacher": whole}), self.device), plan
        )
        self.datasets = {name: LatentDataset(dataset, name) for name in ("train", "held_out")}
        self.frames = plan.scheme.buffer_frames

    def make(self, unit: Unit) -> None:
        """Write one file."""
        from distillation.cache import rollout_rows, write_rollouts

        size = self.config.micro_batch or 8
        rows: list[dict[str, Any]] = []
        for first in range(0, len(unit.positions), size):
            batch, rollout = self.roll_out(unit, unit.positions[first : first + size])
            rows += rollout_rows(rollout, batch.clip_ids, unit.number, self.dtype)
        write_rollouts(self.store, unit.file, rows)

    def roll_out(self, unit: Unit, positions: Sequence[int]) -> tuple[Any, Any]:
        """Batch and rollouts of the clips at `positions`."""
        import torch

        from streamdit.text.base import TextStates
        from training.data import Batch
        from training.objective import stack_draws
        from training.order import sample_generator

        dataset, seed = self.datasets[unit.split], self.config.seed

        def generator(position: int, purpose: str) -> torch.Generator:
            return sample_generator(seed, unit.number, position, f"{unit.split}-{purpose}")

        samples = [
            dataset.sample(place, self.frames, generator(place, "window")) for place in positions
        ]
        batch = Batch(
            torch.stack([sample["latents"] for sample in samples]),
            TextStates.collate([sample["text"] for sample in samples]),
            dataset.null_text(),
            [sample["clip_id"] for sample in samples],
            list(positions),
        ).to(self.device)
        draws = stack_draws(
            [
                self.rollouts.draw(batch.latents.shape[1:], generator(place, "draws"))
                for place in positions
            ]
        )
        draws = {name: value.to(self.device) for name, value in draws.items()}
        return batch, self.rollouts(_no_student, batch, draws)


def _no_student(*_: Any) -> Any:
    raise AssertionError("cached rollouts ask no student")


if __name__ == "__main__":
    from jobs.cli import run_as_module

    run_as_module(command)
