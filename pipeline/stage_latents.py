"""Stage of `encode`: the clips of a unit to latent shards."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from pipeline.child import ChildError
from pipeline.config import IngestConfig
from pipeline.counters import latent_counters
from pipeline.dead_letters import DeadLetter, write_dead_letters
from pipeline.decoders import Blocked, DecoderPool, quarantine
from pipeline.graph import Row, result_row
from pipeline.latents import clip_bytes, encode_frames, latent_row, lead_latents
from pipeline.ledger import Ledger, Wanted
from pipeline.pending import LATENTS, LatentWork, quarantined_sources, select_unit
from pipeline.schema import AUTOENCODER_FOLDER, LATENT_SCHEMA, FileRecord
from pipeline.shards import ShardWriter, bucket_and_part, free_parts
from pipeline.store import open_store
from streamdit.config import AutoencoderIdentity

if TYPE_CHECKING:
    from streamdit.autoencoder.base import Autoencoder


class EncodeLatents:
    """Takes a unit, writes latents of its selected clips, and its marker.

    The autoencoder is loaded when the first unit needs it, and kept; so are the decoders.
    """

    def __init__(
        self, dataset_dir: str, autoencoder: AutoencoderIdentity, config: IngestConfig
    ) -> None:
        import torch

        torch.set_num_threads(config.threads)
        self.store = open_store(dataset_dir)
        self.identity = autoencoder
        self.config = config
        self.device = "cuda" if config.encode.autoencoder_gpus else "cpu"

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, on the device of this actor."""
        from streamdit.autoencoder import load_autoencoder

        own = self.identity.source == AUTOENCODER_FOLDER
        folder = self.store.local_folder(AUTOENCODER_FOLDER) if own else nullcontext("")
        with folder as path:
            return load_autoencoder(path or self.identity.source, self.device)

    @functools.cached_property
    def decoders(self) -> DecoderPool:
        """Processes that decode ahead of the autoencoder."""
        config, lead = self.config, lead_latents(self.identity)
        return DecoderPool(
            config.encode.decoders,
            config.encode.clips_ahead,
            max(clip_bytes(shape, lead) for shape in config.clip.shapes),
            with_lead=bool(lead),
            deadline_s=config.decode.deadline_s,
            threads=config.threads,
        )

    def __call__(self, row: Row) -> Iterable[Row]:
        """Encode what is missing of one unit."""
        unit, wanted = row["unit"], Wanted(settings=row["settings"])
        selected = select_unit(self.store, unit, self.config)
        work = LatentWork.find(self.store, unit, selected, wanted, row["retry_dead"])
        if not work.is_done:
            self._encode(work, wanted, row["retry_dead"])
            work = LatentWork.find(self.store, unit, selected, wanted)
        return [result_row(unit, work.counters)]

    def _encode(self, work: LatentWork, wanted: Wanted, retry_dead: bool) -> None:
        """Write the missing clips to new shards, beside those that are there."""
        ledger = Ledger(self.store, LATENTS)
        ledger.begin(work.unit, wanted)
        records = list(work.marker.files) if work.marker else []
        parts = [bucket_and_part(record.path) for record in records]
        left_alone = set() if retry_dead else quarantined_sources(self.store, work.unit)
        blocked = {source_id: quarantine() for source_id in left_alone if source_id}
        clips = _DecodableClips(self.decoders, work.dead, blocked)
        for shape in self.config.clip.shapes:
            mine = [clip for clip in work.missing if clip["bucket"] == shape.name]
            used = {part for name, part in parts if name == shape.name}
            records += self._write_bucket(work.unit, shape.name, used, clips, mine)
        records.sort(key=lambda record: record.path)
        letters = clips.letters()
        write_dead_letters(self.store, LATENTS, work.unit, letters)
        counters = latent_counters(records, letters)
        ledger.finish(work.unit, wanted, records, counters)

    def _write_bucket(
        self, unit: str, bucket: str, used: set[int], clips: _DecodableClips, rows: list[Row]
    ) -> list[FileRecord]:
        """Encode clips of one size and length in batches, into shards of their own."""
        import torch

        dtype = getattr(torch, self.config.shards.latent_dtype)
        writer = ShardWriter(
            self.store, "latent", unit, bucket, LATENT_SCHEMA, self.config.shards, free_parts(used)
        )
        with writer:
            for batch, frames in clips.batches(rows, self.config.encode.batch):
                latents = encode_frames(self.autoencoder, frames, dtype)
                for clip, latent in zip(batch, latents, strict=True):
                    writer.add(latent_row(clip, latent))
        return writer.records


class _DecodableClips:
    """Batches of the clips that can be decoded; keeps account of the others."""

    def __init__(self, decoders: DecoderPool, dead: Sequence[DeadLetter], blocked: Blocked) -> None:
        self.decoders = decoders
        self.dead = {(letter.source_id, letter.start_s): letter for letter in dead}
        self.blocked = blocked

    def letters(self) -> list[DeadLetter]:
        """Dead letters of all clips that failed, earlier ones included."""
        return sorted(self.dead.values(), key=lambda letter: (letter.uri, letter.start_s or 0.0))

    def batches(self, rows: list[Row], size: int) -> Iterator[tuple[list[Row], np.ndarray]]:
        """Up to `size` clips with their frames `uint8 [b, t, H, W, 3]`, valid until the next."""
        batch: list[Row] = []
        buffer: np.ndarray | None = None
        for row, frames in self.decoders.read(rows, self.blocked):
            if isinstance(frames, ChildError):
                self._note(row, frames)
                continue
            self.dead.pop((row["source_id"], row["start_s"]), None)
            if buffer is None:
                buffer = np.empty((size, *frames.shape), np.uint8)
            buffer[len(batch)] = frames
            batch.append(row)
            if len(batch) == size:
                yield batch, buffer
                batch = []
        if batch and buffer is not None:
            yield batch, buffer[: len(batch)]

    def _note(self, row: Row, error: ChildError) -> None:
        key = (row["source_id"], row["start_s"])
        self.dead[key] = DeadLetter.of(
            error,
            source_id=row["source_id"],
            uri=row["uri"],
            stage=LATENTS,
            attempts=self.dead[key].attempts + 1 if key in self.dead else 1,
            span=(row["start_s"], row["end_s"]),
        )
