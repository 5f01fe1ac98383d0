"""Latent clips of a dataset directory: checked against a model, and read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.schema import AUTOENCODER_FOLDER, Manifest, load_manifest
from pipeline.store import DatasetPath, open_store
from streamdit.autoencoder.base import latent_statistics
from streamdit.config import DiTConfig, StreamDiTConfig, TextEncoderConfig
from streamdit.errors import UserError
from streamdit.text.base import TextStates
from training.row_groups import CACHE_BYTES, RowGroups, read_tensor


@dataclass(frozen=True)
class Batch:
    """Clips of one bucket, as an objective meets them.

    Attributes:
        latents: normalised `[b, f, C, h, w]` float32.
        text: states of their captions.
        null_text: states of the empty caption, batch 1.
        clip_ids: identity of each clip.
        sample_indices: place of each clip in the global batch.
        draws: what an objective drew for each clip, each `[b, ...]` (:data:`Draws` there).
    """

    latents: Tensor
    text: TextStates
    null_text: TextStates
    clip_ids: list[str]
    sample_indices: list[int]
    draws: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; from pinned memory without waiting for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy to pinned memory."""
        return self._map(Tensor.pin_memory)

    def used_by(self, stream: torch.cuda.Stream) -> Batch:
        """Say that `stream` works on these tensors, which another stream made."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        return self._map(record)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def of(text: TextStates) -> TextStates:
            return TextStates(
                {
                    name: (function(values), None if mask is None else function(mask))
                    for name, (values, mask) in text.items()
                }
            )

        return replace(
            self,
            latents=function(self.latents),
            text=of(self.text),
            null_text=of(self.null_text),
            draws={name: function(values) for name, values in self.draws.items()},
        )


ADDRESS = [
    "clip_id",
    *("latent_file", "latent_row_group", "latent_row"),
    *("text_file", "text_row_group", "text_row"),
]
"""Columns of the selection that say where a clip lies."""


class LatentDataset:
    """The selected clips of a dataset directory, by split.

    Args:
        directory: dataset directory with a manifest; a folder or an `s3://` prefix.
        split: `train` or `held_out`.
        cache_bytes: how much of the shards to keep in memory.
    """

    def __init__(self, directory: DatasetPath, split: str, cache_bytes: int = CACHE_BYTES) -> None:
        self.store = open_store(directory)
        self.directory = self.store.root
        self.manifest: Manifest = load_manifest(self.store)
        self.split = split
        table = pq.read_table(
            self.store.source(self.manifest.selection.path), columns=[*ADDRESS, "bucket", "split"]
        )
        # Millions of clips stay a compact table; as objects they would fill the memory.
        table = table.filter(pc.equal(table["split"], split)).combine_chunks()
        self._index = table.select(ADDRESS)
        buckets = table["bucket"].combine_chunks().dictionary_encode()
        codes = buckets.indices.to_numpy()
        self.buckets = {
            name: np.flatnonzero(codes == code)
            for code, name in enumerate(buckets.dictionary.to_pylist())
        }
        self.row_groups = _number_row_groups(table)
        self._groups = RowGroups(self.store, cache_bytes)
        self._names = [encoder.name for encoder in self.manifest.text_encoders]
        self._shift, self._scale = latent_statistics(self.manifest.autoencoder)

    def __len__(self) -> int:
        return len(self._index)

    def groups_in(self, megabytes: float) -> int:
        """Row groups, with the text of their clips, that so much memory holds; at least one."""
        sizes = [sum(f.bytes for f in self.manifest.files_of(kind)) for kind in ("latent", "text")]
        rows = sum(file.rows for file in self.manifest.files_of("latent"))
        largest = 1 + pc.max(self._index["latent_row"]).as_py()
        return max(1, int(megabytes * 2**20 * rows / (sum(sizes) * largest)))

    @property
    def clip_ids(self) -> list[str]:
        """Identity of each clip, by position."""
        ids: list[str] = self._index["clip_id"].to_pylist()
        return ids

    def check_files(self, share: int = 0, of: int = 1) -> None:
        """Refuse a data set whose files are not those of its manifest.

        The selection is hashed; shards, which may be terabytes, are held against their size (each
        row has a checksum of its own, which is looked at when it is read).

        Args:
            share: which share of the files to look at, for workers that divide the work.
            of: number of shares.

        Raises:
            UserError: naming the file and what differs.
        """
        trained_on = ("latent", "text", "text-null", "selection")
        files = [file for file in self.manifest.files if file.kind in trained_on]
        for file in files[share::of]:
            size = self.store.size(file.path)
            if size is None:
                problem = "is missing"
            elif size != file.bytes:
                problem = f"has {size} bytes instead of {file.bytes}"
            elif file.kind == "selection" and self.store.sha256(file.path) != file.sha256:
                problem = "has another content (SHA-256 differs)"
            else:
                continue
            raise UserError(
                f"{self.directory}: {file.path} {problem}, so it is not the file that the "
                "manifest speaks of; copy the data set again, or mend it with `streamdit dataset "
                "repair`"
            )

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
        if not len(self):
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
        address = self._index.slice(position, 1).to_pylist()[0]
        row = self._groups.row(
            address["latent_file"], address["latent_row_group"], address["latent_row"]
        )
        assert row["clip_id"] == address["clip_id"], "selection and latent shard disagree"
        latents = read_tensor(row, "latent", address["latent_file"])
        start = int(torch.randint(len(latents) - frames + 1, (), generator=generator))
        # The shift is float32, so the difference is new memory in float32 for bfloat16 latents too.
        latents = (latents[start : start + frames] - self._shift).mul_(self._scale)
        text = self._groups.row(
            address["text_file"], address["text_row_group"], address["text_row"]
        )
        assert text["clip_id"] == address["clip_id"], "selection and text shard disagree"
        states = {
            name: read_tensor(text, f"text_{name}", address["text_file"]).float()
            for name in self._names
        }
        return {"clip_id": address["clip_id"], "latents": latents, "text": states}

    @property
    def read_bytes(self) -> int:
        """Bytes of row groups read so far."""
        return self._groups.read_bytes

    @contextmanager
    def autoencoder_source(self) -> Iterator[str]:
        """The decoder of the latents as a folder on this machine, or by its name on a hub."""
        source = self.manifest.autoencoder.source
        if source != AUTOENCODER_FOLDER:
            yield source
            return
        with self.store.local_folder(source) as folder:
            yield folder

    def null_text(self) -> TextStates:
        """States of the empty caption."""
        file = next(file for file in self.manifest.files if file.kind == "text-null")
        row = self._groups.row(file.path, 0, 0)
        return TextStates.collate(
            [{name: read_tensor(row, f"text_{name}", file.path).float() for name in self._names}]
        )


def _number_row_groups(selection: pa.Table) -> NDArray[np.int64]:
    """A number for the row group that each clip's latent lies in, `[clips]`."""
    files = selection["latent_file"].combine_chunks().dictionary_encode().indices.to_numpy()
    rows = selection["latent_row_group"].to_numpy().astype(np.int64)
    return np.unique(files * (rows.max(initial=0) + 1) + rows, return_inverse=True)[1]


def _names(encoders: Sequence[TextEncoderConfig]) -> str:
    """Text encoders for a message."""
    return ", ".join(f"{e.name} ({e.source or e.kind}, {e.max_tokens} tokens)" for e in encoders)
