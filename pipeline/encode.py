"""Third job: selected clips to latents, captions to text states, and the manifest over all."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.child import ChildError
from pipeline.config import IngestConfig
from pipeline.dead_letters import DeadLetter, write_dead_letters
from pipeline.graph import OnProgress, Row, result_row, run_stage, run_units
from pipeline.index import publish_dataset
from pipeline.latents import (
    ClipReader,
    batches,
    encode_frames,
    latent_row,
    latent_shape,
    text_rows,
)
from pipeline.ledger import Ledger
from pipeline.pending import Fingerprints, UnitWork, select_unit
from pipeline.plan import require_plan
from pipeline.schema import (
    AUTOENCODER_FOLDER,
    LATENT_SCHEMA,
    MANIFEST_FILE,
    NULL_CLIP_ID,
    NULL_TEXT_FILE,
    BucketRecord,
    FileRecord,
    text_schema,
)
from pipeline.shards import ShardWriter, bucket_and_part, write_table
from streamdit.config import AutoencoderIdentity
from streamdit.errors import UserError

if TYPE_CHECKING:
    from streamdit.autoencoder.base import Autoencoder
    from streamdit.text.base import TextEncoders

NULL_UNIT = "null"
"""Pseudo unit whose text is the empty prompt (classifier-free guidance)."""


@dataclass(frozen=True)
class EncodeSummary:
    """What the published dataset holds."""

    clips: int
    """Clips in the selection, ready for training."""
    held_out: int
    """Of these, clips kept from training."""
    dead: int
    """Selected clips that could not be decoded."""
    latent_bytes: int
    """Size of all latent shards."""
    selection_version: int
    """Version of the selection index."""
    fingerprint: str
    """Identity of the dataset."""


def encode(
    dataset_dir: Path | str,
    autoencoder_source: str,
    config: IngestConfig,
    on_progress: OnProgress | None = None,
) -> EncodeSummary:
    """Encode the selected clips and publish the dataset.

    Only what is not there yet is encoded: clips that a looser selection adds, and captions that
    changed. The autoencoder's directory is copied into the dataset.

    Args:
        dataset_dir: dataset directory, curated and annotated.
        autoencoder_source: directory of an autoencoder, or name or path of a diffusers VAE.
        config: ingestion configuration.
        on_progress: called with units done, units in all and totals, as units finish.

    Raises:
        UserError: if an earlier stage has not finished, the autoencoder does not fit the clips,
            or no clip is selected.
    """
    from streamdit.autoencoder import load_autoencoder

    dataset = Path(dataset_dir)
    units = [unit.name for unit in require_plan(dataset)]
    selected = {name: select_unit(dataset, name, config) for name in units}
    if not any(table.num_rows for table in selected.values()):
        raise _nothing_selected(dataset, config)
    autoencoder = load_autoencoder(autoencoder_source)
    shape = latent_shape(autoencoder, config.clip)
    prints = Fingerprints.of(config, autoencoder.identity)
    works = (UnitWork.find(dataset, name, selected[name], prints) for name in units)
    done = {work.unit: work.counters for work in works if work.is_done}
    if Ledger(dataset, "text").read_done(NULL_UNIT, prints.text([])):
        done[NULL_UNIT] = {}
    tasks = [{"unit": name} for name in [NULL_UNIT, *units] if name not in done]
    if tasks:
        # Until all is published again, shards and manifest may disagree.
        (dataset / MANIFEST_FILE).unlink(missing_ok=True)
    identity = adopt_autoencoder(dataset, autoencoder_source, autoencoder.identity)
    constructor = {
        "dataset_dir": str(dataset.absolute()),
        "autoencoder_source": resolve_autoencoder(dataset, identity),
        "config": config,
        "prints": prints,
    }
    results = run_units(
        tasks,
        EncodeUnit,
        constructor=constructor,
        workers=config.workers,
        cpus=config.threads,
        gpus=config.encode.autoencoder_gpus,
    )
    totals = run_stage([NULL_UNIT, *units], done, results, on_progress)
    bucket = BucketRecord(
        name=config.clip.bucket,
        frames=config.clip.frames,
        height=config.clip.height,
        width=config.clip.width,
        fps=config.clip.fps,
        latent_shape=shape,
    )
    manifest, held_out = publish_dataset(dataset, units, selected, config, identity, [bucket])
    return EncodeSummary(
        clips=manifest.selection.rows,
        held_out=held_out,
        dead=int(totals.get("dead", 0)),
        latent_bytes=sum(record.bytes for record in manifest.files_of("latent")),
        selection_version=manifest.selection.version,
        fingerprint=manifest.fingerprint,
    )


class EncodeUnit:
    """Stage: takes a unit, writes its latent and text shards and their markers.

    Models are loaded when the first unit needs them, and kept.
    """

    def __init__(
        self,
        dataset_dir: str,
        autoencoder_source: str,
        config: IngestConfig,
        prints: Fingerprints,
    ) -> None:
        import torch

        torch.set_num_threads(config.threads)
        self.dataset = Path(dataset_dir)
        self.autoencoder_source = autoencoder_source
        self.config = config
        self.prints = prints
        self.device = "cuda" if config.encode.autoencoder_gpus else "cpu"

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, on the device of this actor."""
        from streamdit.autoencoder import load_autoencoder

        return load_autoencoder(self.autoencoder_source).eval().to(self.device)

    @functools.cached_property
    def text_encoders(self) -> TextEncoders:
        """All text encoders."""
        from streamdit.text import build_text_encoders

        return build_text_encoders(self.config.text_encoders)

    @functools.cached_property
    def reader(self) -> ClipReader:
        """Decodes clips ahead of the autoencoder."""
        identity = self.autoencoder.identity
        return ClipReader(identity, self.config.decode.deadline_s, self.config.threads)

    def __call__(self, row: Row) -> Iterable[Row]:
        """Encode what is missing of one unit."""
        if row["unit"] == NULL_UNIT:
            self._encode_null()
            return [result_row(NULL_UNIT, {})]
        work = self._find(row["unit"])
        if work.latents is None or work.missing:
            self._encode_latents(work)
            work = self._find(row["unit"])
        if work.text is None:
            self._encode_text(work)
        return [result_row(work.unit, work.counters)]

    def _find(self, unit: str) -> UnitWork:
        selected = select_unit(self.dataset, unit, self.config)
        return UnitWork.find(self.dataset, unit, selected, self.prints)

    def _encode_latents(self, work: UnitWork) -> None:
        """Write the missing clips to new shards, after those that are there."""
        import torch

        files = list(work.latents.files) if work.latents else []
        dead = {(letter.source_id, letter.start_s): letter for letter in work.dead}
        dtype = getattr(torch, self.config.shards.latent_dtype)
        bucket = self.config.clip.bucket
        first_part = 1 + max((bucket_and_part(record.path)[1] for record in files), default=-1)
        writer = ShardWriter(
            self.dataset,
            "latent",
            work.unit,
            bucket,
            LATENT_SCHEMA,
            self.config.shards,
            first_part,
        )
        with writer:
            for batch in batches(self._decoded(work.missing, dead), self.config.encode.batch):
                clips = [frames for _, frames in batch]
                latents = encode_frames(self.autoencoder, clips, dtype)
                for (clip, _), latent in zip(batch, latents, strict=True):
                    writer.add(latent_row(clip, latent))
        letters = sorted(dead.values(), key=lambda letter: (letter.uri, letter.start_s or 0.0))
        write_dead_letters(self.dataset, "latents", work.unit, letters)
        Ledger(self.dataset, "latents").finish(
            work.unit, self.prints.latents, [*files, *writer.records], {"dead": len(letters)}
        )

    def _decoded(
        self, clips: list[Row], dead: dict[tuple[str | None, float | None], DeadLetter]
    ) -> Iterator[tuple[Row, Any]]:
        """Clips that can be decoded, with their frames; the others go to `dead`."""
        for clip, frames in self.reader.read(clips):
            key = (clip["source_id"], clip["start_s"])
            if not isinstance(frames, ChildError):
                dead.pop(key, None)
                yield clip, frames
                continue
            dead[key] = DeadLetter.of(
                frames,
                source_id=clip["source_id"],
                uri=clip["uri"],
                stage="latents",
                attempts=dead[key].attempts + 1 if key in dead else 1,
                span=(clip["start_s"], clip["end_s"]),
            )

    def _encode_text(self, work: UnitWork) -> None:
        """Write a text shard beside each latent shard, same clips in the same order."""
        content = work.text_content()
        records: list[FileRecord] = []
        for path, ids in work.stored:
            bucket, part = bucket_and_part(path)
            captions = [
                {"clip_id": i, "caption": text, "caption_model": model}
                for shard, i, text, model in content
                if shard == path
            ]
            assert [row["clip_id"] for row in captions] == ids
            records.append(self._write_text(work.unit, bucket, part, captions))
        wanted = self.prints.text(content)
        Ledger(self.dataset, "text").finish(work.unit, wanted, records, {"clips": len(content)})

    def _write_text(self, unit: str, bucket: str, part: int, captions: list[Row]) -> FileRecord:
        """Write one text shard; it is never split, so that it keeps its latent shard's name."""
        schema = text_schema(encoder.name for encoder in self.config.text_encoders)
        whole = self.config.shards.model_copy(update={"shard_mb": float("inf")})
        with ShardWriter(self.dataset, "text", unit, bucket, schema, whole, part) as writer:
            for row in self._text_rows(captions):
                writer.add(row)
        (record,) = writer.records
        return record

    def _text_rows(self, captions: list[Row]) -> Iterator[Row]:
        import torch

        dtype = getattr(torch, self.config.shards.text_dtype)
        for batch in batches(captions, self.config.encode.batch):
            yield from text_rows(self.text_encoders, batch, dtype)

    def _encode_null(self) -> None:
        """Write the states of the empty prompt."""
        schema = text_schema(encoder.name for encoder in self.config.text_encoders)
        row = {"clip_id": NULL_CLIP_ID, "caption": "", "caption_model": ""}
        rows = list(self._text_rows([row]))
        record = write_table(self.dataset, NULL_TEXT_FILE, "text-null", rows, schema)
        Ledger(self.dataset, "text").finish(NULL_UNIT, self.prints.text([]), [record], {})


def adopt_autoencoder(
    dataset: Path, source: str, identity: AutoencoderIdentity
) -> AutoencoderIdentity:
    """Copy a local autoencoder into the dataset; returns its identity as seen from there."""
    local, target = Path(source), dataset / AUTOENCODER_FOLDER
    if not local.is_dir():
        return identity.model_copy(update={"source": source})
    if (local / "vae").is_dir():
        local = local / "vae"  # of a diffusers pipeline, only this part is needed
    if local.resolve() != target.resolve():
        partial = dataset / f".{AUTOENCODER_FOLDER}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(local, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return identity.model_copy(update={"source": AUTOENCODER_FOLDER})


def resolve_autoencoder(dataset: Path, identity: AutoencoderIdentity) -> str:
    """What to load: the dataset's copy, or the name."""
    if identity.source == AUTOENCODER_FOLDER:
        return str((dataset / AUTOENCODER_FOLDER).absolute())
    return identity.source


def _nothing_selected(dataset: Path, config: IngestConfig) -> UserError:
    return UserError(
        f"selection {config.selection.expression!r} keeps no clip of {dataset}: loosen "
        "selection.expression"
    )
