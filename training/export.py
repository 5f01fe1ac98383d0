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
from streamdit.io import WEIGHTS_FILE, new_model_directory, read_model_config
from training.checkpoint import CheckpointFacts, checkpoint_folder, find_checkpoints, read_facts
from training.config import AdapterConfig
from training.job import TrainJob
from training.lora import merged_weights, save_adapter
from training.shards import SavedShards

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
    path = Path(job.out) / RECORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{RECORD_FILE}.tmp")
    staging.write_text(record.model_dump_json(indent=2) + "\n")
    staging.replace(path)


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


def find_step(run: Path, step: int | None) -> Path:
    """The checkpoint after `step` steps, or the newest.

    Raises:
        UserError: if it is not there; tells which are.
    """
    found = find_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run} has no complete checkpoint yet; let it train up to its first one")
    if step is None:
        return found[0]
    folder = checkpoint_folder(run / "checkpoints", step)
    if folder not in found:
        steps = ", ".join(str(read_facts(path).step) for path in reversed(found))
        raise UserError(f"{run} has no complete checkpoint of step {step}; choose from {steps}")
    return folder


def export_checkpoint(
    run: Path, out: Path, step: int | None = None, weights: Weights | None = None
) -> CheckpointFacts:
    """Write the weights of a checkpoint as a model directory, read it again and compare.

    Weights stay float32. At most two copies of them are in memory, one being the mapped files. Of
    a run that trains adapters the directory holds its parent with the adapters merged in.

    Args:
        run: directory of the run.
        out: model directory to write; an earlier model directory there is replaced.
        step: which checkpoint; default: the newest.
        weights: default: averaged if the run averages them.

    Raises:
        UserError: if there is no such checkpoint, or `out` holds something else.
    """
    record = read_record(run)
    if weights == "ema" and not record.ema:
        raise UserError(f"{run} keeps no averaged weights (ema_decay=0); export --weights raw")
    if out.exists() and not (out / WEIGHTS_FILE).is_file() and any(out.iterdir()):
        raise UserError(f"{out} is there and is no model directory; name another --out")
    folder = find_step(run, step)
    facts = read_facts(folder)
    tensors = _read(folder, record.ema if weights is None else weights == "ema")
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
    tensors = _read(find_step(run, None), record.ema)
    save_adapter(out, record.lora, tensors, record.config.lineage["parent"])


def _read(folder: Path, average: bool) -> dict[str, Tensor]:
    """Trained weights of a checkpoint by name, float32."""
    kind: Literal["average", "weights"] = "average" if average else "weights"
    shards = SavedShards(folder, read_facts(folder).world_size)
    tensors = {name: shards.tensor(kind, name) for name in shards.shapes}
    shards.close()  # else the mapped pages count as a copy while the weights are written
    return tensors


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
