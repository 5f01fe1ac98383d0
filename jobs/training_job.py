"""The job of an ordinary training, checked before any worker starts."""

from __future__ import annotations

from pathlib import Path

from pipeline.schema import load_manifest
from pipeline.store import DatasetPath, DiskStore, open_store
from streamdit.errors import UserError
from training.config import TrainConfig
from training.job import TrainJob
from training.objective import make_flow_matching


def training_job(
    config: TrainConfig,
    dataset: DatasetPath,
    out: Path,
    parent: Path | None = None,
    name: str = "train",
) -> TrainJob:
    """The job that `streamdit train` runs.

    Raises:
        UserError: if there is no data set, or no model for adapters to be trained on.
    """
    check_dataset(dataset)
    if config.lora is not None and parent is None:
        raise UserError(
            "lora trains adapters on a model, but none is given; name a model directory with "
            "--from, or leave lora away"
        )
    return TrainJob(
        config=config,
        model=config.model,
        partition=config.partition,
        sampling=config.sampling,
        dataset=open_store(dataset).root,
        out=str(out.resolve()),
        make_objective=make_flow_matching,
        run_name=name,
        parent=str(parent.resolve()) if parent else None,
        tags={"stage": "train"},
    )


def check_dataset(dataset: DatasetPath) -> None:
    """Refuse a path that is no dataset before any worker starts."""
    store = open_store(dataset)
    if isinstance(store, DiskStore) and not store.folder.is_dir():
        raise UserError(
            f"dataset {dataset} does not exist; make one with `streamdit ingest VIDEOS --out "
            f"{dataset} --autoencoder DIR`"
        )
    load_manifest(store)
