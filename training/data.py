"""Latent clips in training order.

The order is a pure function of (seed, step): the whole state of the loader is one integer, and a
resumed run sees what the uninterrupted one would have seen, on any number of workers.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.schema import Manifest, decode_tensor, encode_tensor, load_manifest
from streamdit.autoencoder.base import latent_statistics
from streamdit.config import DiTConfig, StreamDiTConfig, TextEncoderConfig
from streamdit.errors import UserError
from streamdit.text.base import TextStates


@dataclass(frozen=True)
class Batch:
    """Clips of one bucket, as an objective meets them.

    Attributes:
        latents: normalised `[b, f, C, h, w]` float32.
        text: states of their captions.
        null_text: states of the empty caption, batch 1.
        clip_ids: identity of each clip.
        sample_indices: place of each clip in the global batch.
    """

    latents: Tensor
    text: TextStates
    null_text: TextStates
    clip_ids: list[str]
    sample_indices: list[int]

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`."""
        return Batch(
            self.latents.to(device, non_blocking=True),
            self.text.to(device),
            self.null_text.to(device),
            self.clip_ids,
            self.sample_indices,
        )


class RowGroups:
    """Row groups of Parquet shards, read whole and kept while they fit a budget of bytes."""

    def __init__(self, root: Path, budget_bytes: int = 512 << 20) -> None:
        self.root = root
        self.budget_bytes = budget_bytes
        self._cache: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._bytes = 0

    def row(self, file: str, group: int, row: int) -> dict[str, Any]:
        """One row, by its address."""
        table = self._table(file, group)
        values: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
        return values

    def _table(self, file: str, group: int) -> pa.Table:
        key = (file, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        # pre_buffer holds whole files of wide binary columns in memory; one group is enough.
        with pq.ParquetFile(self.root / file, pre_buffer=False) as parquet:
            table = parquet.read_row_group(group)
        self._cache[key] = table
        self._bytes += table.nbytes
        while self._bytes > self.budget_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.nbytes
        return table


def read_tensor(row: dict[str, Any], column: str, where: str) -> Tensor:
    """A tensor column of a shard row, after checking its CRC."""
    payload = row[column]
    if zlib.crc32(payload) != row[f"{column}_crc"]:
        raise UserError(
            f"{where}: column {column} of clip {row['clip_id']} is damaged (CRC differs); encode "
            "the data set again"
        )
    return decode_tensor(payload, row[f"{column}_shape"], row[f"{column}_dtype"])


def tensor_columns(tensor: Tensor, column: str) -> dict[str, Any]:
    """The columns of a tensor in a row, for :func:`read_tensor`."""
    keys = (column, f"{column}_shape", f"{column}_dtype", f"{column}_crc")
    return dict(zip(keys, encode_tensor(tensor), strict=True))


class LatentDataset:
    """The selected clips of a dataset directory, by split.

    Args:
        directory: dataset directory with a manifest.
        split: `train` or `held_out`.
    """

    def __init__(self, directory: Path | str, split: str) -> None:
        self.directory = Path(directory)
        self.manifest: Manifest = load_manifest(self.directory)
        self.split = split
        table = pq.read_table(self.directory / self.manifest.selection.path)
        self._index = [row for row in table.to_pylist() if row["split"] == split]
        self.buckets: dict[str, list[int]] = {}
        for position, row in enumerate(self._index):
            self.buckets.setdefault(row["bucket"], []).append(position)
        self._groups = RowGroups(self.directory)
        self._names = [encoder.name for encoder in self.manifest.text_encoders]
        self._shift, self._scale = latent_statistics(self.manifest.autoencoder)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def clip_ids(self) -> list[str]:
        """Identity of each clip, by position."""
        return [row["clip_id"] for row in self._index]

    def check_fits(self, model: DiTConfig, autoencoder: str | None = None) -> None:
        """Refuse a data set that this model cannot be trained on.

        Args:
            model: shape of the transformer.
            autoencoder: kind of autoencoder that the latents must come from; None: any.

        Raises:
            UserError: naming what differs.
        """
        manifest = self.manifest
        kind = manifest.autoencoder.kind
        if autoencoder not in (None, kind):
            raise UserError(
                f"{self.directory}: its latents come from a {kind} autoencoder but the "
                f"configuration's is {autoencoder}; encode the data set with that one, or set "
                f"autoencoder={kind}"
            )
        channels = manifest.autoencoder.latent_channels
        if channels != model.latent_channels:
            raise UserError(
                f"{self.directory}: latents have {channels} channels but model.latent_channels is "
                f"{model.latent_channels}; change the model or encode with another autoencoder"
            )
        widths = {encoder.name: encoder.width for encoder in manifest.text_encoders}
        if widths != model.text:
            raise UserError(
                f"{self.directory}: text encoders {widths} do not match model.text {model.text}; "
                "change model.text or run the encode stage with those encoders"
            )
        grids = {(bucket.height, bucket.width) for bucket in model.buckets}
        needed = model.buffer_frames
        for bucket in manifest.buckets:
            frames, _, height, width = bucket.latent_shape
            if bucket.name in self.buckets and (height, width) not in grids:
                raise UserError(
                    f"{self.directory}: bucket {bucket.name} has latents of {height}x{width}, "
                    f"which model.buckets {sorted(grids)} does not list; add it with its window"
                )
            if bucket.name in self.buckets and frames < needed:
                raise UserError(
                    f"{self.directory}: bucket {bucket.name} has {frames} latent frames but the "
                    f"buffer needs {needed}; ingest longer clips (clip.frames)"
                )
        if not self._index:
            raise UserError(
                f"{self.directory}: the selection has no clip in split {self.split!r}; loosen the "
                "selection expression or add videos"
            )

    def check_continues(self, parent: StreamDiTConfig) -> None:
        """Refuse latents or text states of other encoders than a parent model was trained with.

        Raises:
            UserError: naming what differs.
        """
        mine, theirs = self.manifest.autoencoder, parent.autoencoder
        if (mine.sha256, mine.scale, mine.shift) != (theirs.sha256, theirs.scale, theirs.shift):
            raise UserError(
                f"{self.directory}: its latents come from autoencoder {mine.sha256[:12]}... but "
                f"the model to start from knows those of {theirs.sha256[:12]}...; encode the data "
                "set with the model's autoencoder (MODEL_DIR/autoencoder)"
            )
        if self.manifest.text_encoders != parent.text_encoders:
            raise UserError(
                f"{self.directory}: text encoders {_names(self.manifest.text_encoders)} are not "
                f"those of the model to start from, {_names(parent.text_encoders)}; run the encode "
                "stage with the model's text encoders"
            )

    def sample(self, position: int, frames: int, generator: torch.Generator) -> dict[str, Any]:
        """Normalised latents `[frames, C, h, w]` and text states of one clip.

        A clip longer than the buffer gives a window drawn from it. Every stored latent stands for
        a whole group of frames: where an autoencoder's first does not, it was not stored.
        """
        address = self._index[position]
        row = self._groups.row(
            address["latent_file"], address["latent_row_group"], address["latent_row"]
        )
        assert row["clip_id"] == address["clip_id"], "selection and latent shard disagree"
        latents = read_tensor(row, "latent", address["latent_file"]).float()
        start = int(torch.randint(len(latents) - frames + 1, (), generator=generator))
        latents = (latents[start : start + frames] - self._shift) * self._scale
        text = self._groups.row(
            address["text_file"], address["text_row_group"], address["text_row"]
        )
        assert text["clip_id"] == address["clip_id"], "selection and text shard disagree"
        states = {
            name: read_tensor(text, f"text_{name}", address["text_file"]).float()
            for name in self._names
        }
        return {"clip_id": address["clip_id"], "latents": latents, "text": states}

    def null_text(self) -> TextStates:
        """States of the empty caption."""
        file = next(file for file in self.manifest.files if file.kind == "text-null")
        row = self._groups.row(file.path, 0, 0)
        return TextStates.collate(
            [{name: read_tensor(row, f"text_{name}", file.path).float() for name in self._names}]
        )


def _names(encoders: Sequence[TextEncoderConfig]) -> str:
    """Text encoders for a message."""
    return ", ".join(f"{e.name} ({e.source or e.kind}, {e.max_tokens} tokens)" for e in encoders)


class BatchOrder:
    """Which clips make up global batch number `step`; a pure function of (seed, step).

    Each bucket's clips form an endless sequence of shuffled epochs that is cut into global
    batches, so what is left of one epoch begins the next. An epoch's batches of all buckets are
    shuffled among each other; a batch never mixes buckets.
    """

    def __init__(self, buckets: dict[str, list[int]], global_batch: int, seed: int) -> None:
        self.buckets = {name: buckets[name] for name in sorted(buckets)}
        self.global_batch = global_batch
        self.seed = seed
        self._plan = lru_cache(maxsize=4)(self._plan_epoch)
        self._permutation = lru_cache(maxsize=4 * len(buckets))(self._permute)
        self._ends = [0]

    def batch(self, step: int) -> list[int]:
        """Positions of the clips in global batch `step`."""
        epoch = self.epoch(step)
        name, number = self._plan(epoch)[step - self._ends[epoch]]
        clips = self.buckets[name]
        positions = range(number * self.global_batch, (number + 1) * self.global_batch)
        return [
            clips[self._permutation(name, place // len(clips))[place % len(clips)]]
            for place in positions
        ]

    def epoch(self, step: int) -> int:
        """The epoch that global batch `step` belongs to."""
        while self._ends[-1] <= step:
            self._ends.append(self._ends[-1] + len(self._plan(len(self._ends) - 1)))
        return int(np.searchsorted(self._ends, step, side="right")) - 1

    def _plan_epoch(self, epoch: int) -> list[tuple[str, int]]:
        """(bucket, batch number within the bucket) of every global batch of an epoch."""
        batches = [
            (name, number)
            for name, clips in self.buckets.items()
            for number in range(
                epoch * len(clips) // self.global_batch,
                (epoch + 1) * len(clips) // self.global_batch,
            )
        ]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(batches))
        return [batches[index] for index in order]

    def _permute(self, name: str, epoch: int) -> list[int]:
        key = zlib.crc32(name.encode())
        generator = np.random.default_rng([self.seed, key, epoch])
        return generator.permutation(len(self.buckets[name])).tolist()


def sample_generator(seed: int, step: int, index: int, purpose: str) -> torch.Generator:
    """Generator of one sample's draws: a pure function of its place in the run."""
    entropy = [seed, step, index, zlib.crc32(purpose.encode())]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class BatchLoader:
    """Micro-batches of one rank, read ahead in a background thread.

    Args:
        dataset: clips to read.
        order: which clips a step takes.
        frames: latent frames of the model's buffer.
        rank: this worker.
        world_size: number of workers; rank r takes the r-th slice of every global batch.
        micro_batch: clips per micro-batch.
        ahead: steps read ahead.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        order: BatchOrder,
        frames: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        ahead: int = 2,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.frames = frames
        self.micro_batch = micro_batch
        self.ahead = ahead
        share = order.global_batch // world_size
        self._slice = range(rank * share, (rank + 1) * share)
        self._null_text = dataset.null_text()

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Micro-batches of steps `first` ... `last - 1`, a list per step."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            pending: deque[Future[list[Batch]]] = deque()
            for step in range(first, last):
                while len(pending) <= self.ahead and step + len(pending) < last:
                    pending.append(pool.submit(self._load, step + len(pending)))
                yield pending.popleft().result()

    def _load(self, step: int) -> list[Batch]:
        clips = self.order.batch(step)
        return [
            self.collate(clips, list(self._slice[start : start + self.micro_batch]), step)
            for start in range(0, len(self._slice), self.micro_batch)
        ]

    def collate(self, clips: Sequence[int], indices: list[int], step: int) -> Batch:
        """The clips of a global batch at `indices`, as one micro-batch."""
        samples = [
            self.dataset.sample(
                clips[index],
                self.frames,
                sample_generator(self.order.seed, step, index, "window"),
            )
            for index in indices
        ]
        return Batch(
            torch.stack([sample["latents"] for sample in samples]),
            TextStates.collate([sample["text"] for sample in samples]),
            self._null_text,
            [sample["clip_id"] for sample in samples],
            indices,
        )
