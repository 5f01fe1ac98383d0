"""From a run's checkpoint to a model directory, on any machine with the memory for one model.

No process group is needed: the shards of all ranks are read from disk, whatever number of workers
and ZeRO stage saved them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.schema import AUTOENCODER_FOLDER, Manifest
from pipeline.store import DiskStore, open_store
from streamdit.config import StreamDiTConfig, StrictModel
from streamdit.errors import UserError
from streamdit.files import replace_text
from streamdit.io import WEIGHTS_FILE, new_model_directory, read_model_config
from training.checkpoint import (
    MARKER,
    CheckpointFacts,
    checkpoint_folder,
    find_checkpoints,
    find_damage,
    read_facts,
    step_of,
    warn_of_damage,
)
from training.config import AdapterConfig
from training.job import TrainJob
from training.lora import merged_weights, save_adapter
from training.revision import git_revision
from training.shards import Kind, SavedShards, files_with

Weights = Literal["ema", "raw"]
"""Averaged weights, or those of the last step."""

RECORD_FILE = "run.json"


class RunRecord(StrictModel):
    """What makes a model directory of a run's weights; written beside the checkpoints."""

    config: StreamDiTConfig
    """Configuration of the model directory, but for the step; its autoencoder by a full path."""
    ema: bool
    """Whether the run averages its weights."""
    parent: str | None
    """Model directory that the run started from."""
    lora: AdapterConfig | None
    """Adapters that the run trains on its parent, instead of all weights."""


def write_record(job: TrainJob, manifest: Manifest) -> None:
    """Note beside the checkpoints of a run what its model directory will say."""
    source = _autoencoder_of(job, manifest)
    lineage = {
        "fingerprint": job.fingerprint(),
        "dataset_fingerprint": manifest.fingerprint,
        "git_revision": git_revision(),
        "parent": read_model_config(job.parent).weights_sha256 if job.parent else None,
    }
    record = RunRecord(
        config=StreamDiTConfig(
            model=job.model,
            partition=job.partition,
            sampling=job.sampling,
            distilled=job.distilled,
            autoencoder=manifest.autoencoder.model_copy(update={"source": source}),
            text_encoders=manifest.text_encoders,
            fps=manifest.buckets[0].fps,
            lineage=lineage,
        ),
        ema=job.config.ema_decay > 0,
        parent=job.parent,
        lora=job.config.lora,
    )
    replace_text(Path(job.out) / RECORD_FILE, record.model_dump_json(indent=2) + "\n")


def _autoencoder_of(job: TrainJob, manifest: Manifest) -> str:
    """Where the data set's autoencoder lies on disk; the run keeps a copy of one in a store."""
    source, store = manifest.autoencoder.source, open_store(job.dataset)
    if source != AUTOENCODER_FOLDER:
        return source
    if isinstance(store, DiskStore):
        return store.uri(source)
    kept = Path(job.out) / AUTOENCODER_FOLDER
    with store.local_folder(source) as folder:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    return str(kept)


def read_record(run: Path) -> RunRecord:
    """What :func:`write_record` noted.

    Raises:
        UserError: if `run` is no directory of a run.
    """
    path = run / RECORD_FILE
    if not path.is_file():
        raise UserError(
            f"{run} is no directory of a run: it has no {RECORD_FILE}; give what --out named when "
            "it was trained"
        )
    try:
        return RunRecord.model_validate_json(path.read_text())
    except ValidationError as error:
        raise UserError(
            f"{path} does not fit this version of streamdit ({error.errors()[0]['msg']}); export "
            "with the version that trained it"
        ) from None


def find_step(run: Path, step: int | None, kind: Kind) -> tuple[Path, CheckpointFacts]:
    """The checkpoint after `step` steps, or the newest that has its weights undamaged.

    Raises:
        UserError: if it is not there, telling which are, or is damaged.
    """
    found = find_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run} has no complete checkpoint yet; let it train up to its first one")
    steps = ", ".join(str(step_of(path)) for path in reversed(found))
    wanted = found if step is None else [checkpoint_folder(run / "checkpoints", step)]
    if wanted[0] not in found:
        raise UserError(f"{run} has no complete checkpoint of step {step}; choose from {steps}")
    for folder in wanted:
        try:
            facts = read_facts(folder)
            needed = {name: facts.files[name] for name in files_with(kind, facts.files)}
            damage = find_damage(folder, needed)
        except (ValueError, TypeError, OSError) as error:
            damage = f"{MARKER} cannot be read ({error})"
        if damage is None:
            return folder, facts
        if step is not None:
            raise UserError(f"{folder} is damaged ({damage}); choose another --step, or none")
        warn_of_damage(folder, damage)
    raise UserError(f"no checkpoint in {run} can be used; the same training command makes new ones")


def export_checkpoint(
    run: Path, out: Path, step: int | None = None, weights: Weights | None = None
) -> CheckpointFacts:
    """Write the weights of a checkpoint as a model directory, read it again and compare.

    Weights stay float32. At most two copies of them are in memory, one being the mapped files. Of
    a run that trains adapters the directory holds its parent with the adapters merged in.

    Args:
        run: directory of the run.
        out: model directory to write; an earlier model directory there is replaced.
        step: which checkpoint; default: the newest that is not damaged.
        weights: default: averaged if the run averages them.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, or `out` holds something else.
    """
    record = read_record(run)
    if weights == "ema" and not record.ema:
        raise UserError(f"{run} keeps no averaged weights (ema_decay=0); export --weights raw")
    if out.exists() and not (out / WEIGHTS_FILE).is_file() and any(out.iterdir()):
        raise UserError(f"{out} is there and is no model directory; name another --out")
    averaged = record.ema if weights is None else weights == "ema"
    facts, tensors = _read(run, step, averaged)
    if record.lora is not None:
        assert record.parent is not None, "adapters are trained on a parent"
        tensors = merged_weights(Path(record.parent), record.lora, tensors)
    with new_model_directory(out, _config_at(record, facts)) as path:
        save_file(tensors, path, {"format": "pt"})
        _compare(path, tensors)
    return facts


def export_adapter(run: Path, out: Path) -> None:
    """Write the newest adapters of a run apart from the model that they are for."""
    record = read_record(run)
    assert record.lora is not None
    _, tensors = _read(run, None, record.ema)
    save_adapter(out, record.lora, tensors, record.config.lineage["parent"])


def _read(run: Path, step: int | None, average: bool) -> tuple[CheckpointFacts, dict[str, Tensor]]:
    """A checkpoint's facts, and its trained weights by name, float32."""
    kind: Kind = "average" if average else "weights"
    folder, facts = find_step(run, step, kind)
    shards = SavedShards(folder, facts.world_size)
    tensors = {name: shards.tensor(kind, name) for name in shards.shapes}
    shards.close()  # else the mapped pages count as a copy while the weights are written
    return facts, tensors


def _config_at(record: RunRecord, facts: CheckpointFacts) -> StreamDiTConfig:
    """The configuration of a model directory that holds the weights of a checkpoint."""
    source = record.config.autoencoder.source
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise UserError(
            f"the autoencoder of the run, {source}, is gone; put it back there and export again"
        )
    lineage = record.config.lineage | {"run_id": facts.run_id, "step": facts.step}
    return record.config.model_copy(update={"lineage": lineage})


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    """Make sure that what was written is what was meant.

    Raises:
        RuntimeError: if anything differs (a failing disk).
    """
    with safe_open(path, framework="pt") as written:
        if set(written.keys()) != set(tensors):
            raise RuntimeError(f"{path} does not hold the tensors that were written")
        for name, tensor in tensors.items():
            if not torch.equal(written.get_tensor(name), tensor):
                raise RuntimeError(f"{path}: {name} was not written as it is in memory")
