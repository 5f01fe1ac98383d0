"""Teacher rollouts that are kept, for a distillation that needs no teacher in memory.

rollouts/
  manifest.json        what was asked of which teacher on which data set; written last
  rollouts-....parquet a row per rollout, found by clip
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError

from distillation.plan import RolloutPlan
from distillation.rollout import Rollout
from pipeline.store import DatasetPath, Store, open_store
from streamdit.config import StreamDiTConfig, StrictModel
from streamdit.errors import UserError
from streamdit.flow import VelocityFunction
from training.data import Batch, LatentDataset
from training.objective import Draws
from training.row_groups import RowGroups, read_tensor, tensor_columns

MANIFEST_FILE = "manifest.json"
TENSORS = ("start", "target")
MADE_ANEW = "remove this file, and the same `streamdit rollouts` makes it anew"
GROUP_BYTES = 16 << 20
READERS = 16
"""Files looked into at once; on S3 each look is a few requests."""

ROLLOUT_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("number", pa.int32()),
        ("kind", pa.int8()),
        ("positions", pa.list_(pa.int32())),
        ("moving", pa.list_(pa.bool_())),
    ]
    + [
        field
        for name in TENSORS
        for field in (
            (name, pa.large_binary()),
            (f"{name}_shape", pa.list_(pa.int32())),
            (f"{name}_dtype", pa.string()),
            (f"{name}_crc", pa.uint32()),
        )
    ]
)


class RolloutManifest(StrictModel):
    """What a directory of rollouts holds."""

    format_version: Literal[1] = 1
    """Version of the layout."""
    teacher_sha256: str
    """Hash of the teacher's weights."""
    dataset_fingerprint: str
    """Fingerprint of the data set."""
    plan: dict[str, Any]
    """What the teacher was asked for."""
    seed: int
    """Seed of what was drawn."""
    precision: str
    """Floating type that the teacher ran in and targets are kept in."""
    per_clip: int
    """Rollouts of each clip."""
    files: tuple[str, ...]
    """Parquet files."""


def plan_record(plan: RolloutPlan) -> dict[str, Any]:
    """What decides a rollout's numbers, as it stands in a manifest."""
    record = asdict(plan) | {
        "gamma": plan.gamma.model_dump(),
        "guidance": list(plan.guidance),
    }
    del record["drift"]  # cached rollouts have none
    return json.loads(json.dumps(record))  # as it comes back from a file


def read_manifest(store: Store) -> RolloutManifest:
    """Manifest of a directory of rollouts.

    Raises:
        UserError: if there is none, because the job has not finished.
    """
    try:
        return RolloutManifest.model_validate_json(store.read_text(MANIFEST_FILE))
    except FileNotFoundError:
        raise UserError(
            f"{store.root} holds no finished rollouts; run `streamdit rollouts DATASET --teacher "
            f"MODEL_DIR --out {store.root}` to its end"
        ) from None
    except ValidationError as error:
        raise UserError(
            f"{store.uri(MANIFEST_FILE)} does not fit this version ({error.errors()[0]['msg']}); "
            "make the rollouts anew"
        ) from None


def rollout_rows(
    rollout: Rollout, clip_ids: Sequence[str], number: int, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Rows of a batch of rollouts."""
    for row, clip_id in enumerate(clip_ids):
        values: dict[str, Any] = {
            "clip_id": clip_id,
            "number": number,
            "kind": int(rollout.kind[row]),
            "positions": rollout.positions[row].tolist(),
            "moving": rollout.moving[row].tolist(),
        }
        for name in TENSORS:
            values |= tensor_columns(getattr(rollout, name)[row].to(dtype), name)
        yield values


def write_rollouts(store: Store, file: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as one Parquet file, whole or not at all."""
    table = pa.Table.from_pylist(list(rows), schema=ROLLOUT_SCHEMA)
    per_group = max(1, GROUP_BYTES * len(rows) // max(1, table.nbytes))
    sink = store.sink(file)
    # As the data set's shards: numbers of a model hardly shrink, and plain pages are read in place.
    pq.write_table(table, sink.file, compression="none", row_group_size=per_group)
    sink.finish()


def _clips_of(store: Store, file: str) -> list[list[str]]:
    """Clips of a file's rows, by row group."""
    with pq.ParquetFile(store.source(file)) as parquet:
        groups = range(parquet.num_row_groups)
        tables = [parquet.read_row_group(group, columns=["clip_id"]) for group in groups]
    return [table["clip_id"].to_pylist() for table in tables]


class CachedRollouts:
    """Rollouts from files; a clip that has several gives one of them at random.

    Args:
        directory: what `streamdit rollouts` wrote, a folder or an `s3://` prefix.

    Raises:
        UserError: if there are none.
    """

    def __init__(self, directory: DatasetPath) -> None:
        store = open_store(directory)
        self.directory = store.root
        self.manifest = read_manifest(store)
        self._groups = RowGroups(store)
        self._places: dict[str, list[tuple[str, int, int]]] = {}
        with ThreadPoolExecutor(READERS) as readers:
            clips = readers.map(partial(_clips_of, store), self.manifest.files)
            for file, groups in zip(self.manifest.files, clips, strict=True):
                for group, clip_ids in enumerate(groups):
                    for row, clip_id in enumerate(clip_ids):
                        self._places.setdefault(clip_id, []).append((file, group, row))

    def check_fits(
        self,
        plan: RolloutPlan,
        parent: StreamDiTConfig,
        dataset: DatasetPath,
        precision: str = "bfloat16",
    ) -> None:
        """Refuse rollouts of another teacher, data set or plan, or rougher ones, than the run's.

        Raises:
            UserError: naming what differs.
        """
        manifest = self.manifest
        fingerprint = LatentDataset(dataset, "train").manifest.fingerprint
        if manifest.teacher_sha256 != parent.weights_sha256:
            raise UserError(
                f"{self.directory} was made by teacher {manifest.teacher_sha256[:12]}..., not by "
                f"{parent.weights_sha256[:12]}...; give that teacher, or make the rollouts anew"
            )
        if manifest.dataset_fingerprint != fingerprint:
            raise UserError(
                f"{self.directory} was made from data set {manifest.dataset_fingerprint}, not "
                f"from {fingerprint}; give that data set, or make the rollouts anew"
            )
        if (manifest.precision, precision) == ("bfloat16", "float32"):
            raise UserError(
                f"{self.directory} was made in bfloat16 but the run is in float32; make the "
                "rollouts with precision=float32, or set precision=bfloat16"
            )
        wanted = plan_record(plan)
        for name, value in manifest.plan.items():
            if value != wanted[name]:
                raise UserError(
                    f"{self.directory} was made with {name}={value} but the run asks for "
                    f"{wanted[name]}; change the `teacher` settings, or make the rollouts anew"
                )

    @staticmethod
    def draw(latent_shape: torch.Size, generator: torch.Generator, progress: float = 0.0) -> Draws:
        """Which of a clip's rollouts to take."""
        return {"choice": torch.randint(0, 1 << 30, (), generator=generator)}

    def extra_forwards(self, draws: Draws) -> int:
        """None now: the teacher was asked before the run."""
        return 0

    def __call__(self, student: VelocityFunction, batch: Batch, draws: Draws) -> Rollout:
        """Rollouts of the batch's clips."""
        rows, loaded = [], []
        for clip_id, choice in zip(batch.clip_ids, draws["choice"].tolist(), strict=True):
            places = self._places[clip_id]
            place = places[choice % len(places)]
            row, where = self._groups.row(*place), self._groups.store.uri(place[0])
            rows.append(row)
            loaded.append([read_tensor(row, name, where, MADE_ANEW) for name in TENSORS])
        device = batch.latents.device
        columns = map(torch.stack, zip(*loaded, strict=True))
        tensors = dict(zip(TENSORS, columns, strict=True))
        return Rollout(
            start=tensors["start"].float().to(device),
            target=tensors["target"].float().to(device),
            positions=torch.tensor([row["positions"] for row in rows], device=device),
            moving=torch.tensor([row["moving"] for row in rows], device=device),
            kind=torch.tensor([row["kind"] for row in rows], device=device),
        )
