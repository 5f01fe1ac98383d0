"""Third job: selected clips to latents, captions to text states, and the manifest over all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.config import IngestConfig
from pipeline.dead_letters import DeadLimit
from pipeline.duplicate_table import require_duplicates
from pipeline.graph import OnProgress, run_stage, run_units
from pipeline.index import publish_dataset
from pipeline.latents import latent_shape
from pipeline.ledger import READERS, Ledger, Wanted
from pipeline.pending import (
    LATENTS,
    TEXT,
    LatentWork,
    TextWork,
    latent_settings,
    nothing_selected,
    select_unit,
    text_settings,
)
from pipeline.plan import require_unit_names
from pipeline.removal import finish_removal
from pipeline.schema import AUTOENCODER_FOLDER, MANIFEST_FILE, BucketRecord
from pipeline.settings import adopt_settings, settings_fingerprint
from pipeline.stage_latents import EncodeLatents
from pipeline.stage_text import NULL_UNIT, EncodeTexts
from pipeline.store import DatasetPath, Store, open_store
from pipeline.threads import map_in_order
from streamdit.config import AutoencoderIdentity


@dataclass(frozen=True)
class EncodeSummary:
    """What the published dataset holds."""

    clips: int
    """Clips in the selection, ready for training."""
    video_s: float
    """Seconds that they cover."""
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
    dataset_dir: DatasetPath,
    autoencoder_source: str,
    config: IngestConfig,
    on_progress: OnProgress | None = None,
    *,
    retry_dead: bool = False,
    replace: bool = False,
) -> EncodeSummary:
    """Encode the selected clips and publish the dataset.

    Only what is not there yet is encoded: clips that a looser selection adds, and captions that
    changed. The autoencoder's directory is copied into the dataset.

    Args:
        dataset_dir: dataset directory or `s3://` prefix, curated and annotated.
        autoencoder_source: directory of an autoencoder, or name or path of a diffusers VAE.
        config: ingestion configuration.
        on_progress: called with units done, units in all and totals, as units finish; every unit
            counts once for its latents and once for its text.
        retry_dead: try again whatever failed before.
        replace: do units again that were made with other settings or another autoencoder.

    Raises:
        UserError: if an earlier stage has not finished, the autoencoder does not fit the clips,
            there are units made with other settings, too many clips fail, or none is selected.
    """
    from streamdit.autoencoder import load_autoencoder

    store = open_store(dataset_dir)
    finish_removal(store)
    units = require_unit_names(store)
    require_duplicates(store, units)
    autoencoder = load_autoencoder(autoencoder_source)
    shapes = {shape: latent_shape(autoencoder, shape) for shape in config.clip.shapes}
    identity = identity_in_dataset(autoencoder_source, autoencoder.identity)
    settings = {LATENTS: latent_settings(config, identity), TEXT: text_settings(config)}
    job = _Encoding(store, config, units, on_progress)
    # Before anything is recorded: there may be nothing to encode.
    done = job.find_latents(settings_fingerprint(settings[LATENTS]), retry_dead)
    prints = adopt_settings(store, settings, config, identity, replace)
    totals = job.encode_latents(done, autoencoder_source, identity, prints[LATENTS], retry_dead)
    job.encode_texts(prints[TEXT], totals)
    buckets = [
        BucketRecord(
            name=shape.name,
            frames=shape.frames,
            height=shape.height,
            width=shape.width,
            fps=config.clip.fps,
            latent_shape=latents,
        )
        for shape, latents in shapes.items()
    ]
    published = publish_dataset(store, units, job.select, config, identity, buckets)
    manifest = published.manifest
    return EncodeSummary(
        clips=manifest.selection.rows,
        video_s=published.video_s,
        held_out=published.held_out,
        dead=int(totals.get("dead", 0)),
        latent_bytes=sum(record.bytes for record in manifest.files_of("latent")),
        selection_version=manifest.selection.version,
        fingerprint=manifest.fingerprint,
    )


class _Encoding:
    """The two stages of one call of :func:`encode`, with their common progress."""

    def __init__(
        self, store: Store, config: IngestConfig, units: list[str], on_progress: OnProgress | None
    ) -> None:
        self.store = store
        self.config = config
        self.units = units
        self.on_progress = on_progress

    def select(self, unit: str) -> pa.Table:
        """Clips of a unit that the selection keeps."""
        return select_unit(self.store, unit, self.config)

    def find_latents(self, settings: str, retry_dead: bool) -> dict[str, dict[str, float]]:
        """Counters of the units whose selected clips all have latents.

        Raises:
            UserError: if no clip is selected, or an earlier stage has not finished.
        """
        wanted = Wanted(settings=settings)

        def look(unit: str) -> tuple[int, dict[str, float] | None]:
            selected = self.select(unit)
            work = LatentWork.find(self.store, unit, selected, wanted, retry_dead)
            return selected.num_rows, work.counters if work.is_done else None

        clips, done = 0, {}
        found = map_in_order(look, self.units, READERS)  # of which nothing more is kept
        for unit, (selected, counters) in zip(self.units, found, strict=True):
            clips += selected
            if counters is not None:
                done[unit] = counters
        if not clips:
            raise nothing_selected(self.store, self.config)
        return done

    def encode_latents(
        self,
        done: Mapping[str, dict[str, float]],
        autoencoder_source: str,
        identity: AutoencoderIdentity,
        settings: str,
        retry_dead: bool,
    ) -> dict[str, float]:
        """Encode the units that are not done; returns totals over all."""
        tasks = [
            {"unit": unit, "settings": settings, "retry_dead": retry_dead}
            for unit in self.units
            if unit not in done
        ]
        if tasks:
            self._withdraw()
            adopt_autoencoder(self.store, autoencoder_source, identity)
        results = run_units(
            tasks,
            EncodeLatents,
            constructor={
                "dataset_dir": self.store.root,
                "autoencoder": identity,
                "config": self.config,
            },
            workers=self.config.workers,
            cpus=self.config.threads + self.config.encode.decoders - 1,
            gpus=self.config.encode.autoencoder_gpus,
        )
        limit = DeadLimit(self.store, LATENTS, self.config.limits)
        totals = run_stage(self.units, done, results, self._progress_from(0, {}), limit)
        if tasks:
            Ledger(self.store, LATENTS).sweep(self.units)
        return totals

    def encode_texts(self, settings: str, before: Mapping[str, float]) -> None:
        """Encode the captions of all latents, where that is not done."""
        ledger = Ledger(self.store, TEXT)
        inputs = map_in_order(
            lambda unit: TextWork.find(self.store, unit).wanted(settings), self.units, READERS
        )
        wanted = dict(zip(self.units, inputs, strict=True))
        wanted[NULL_UNIT] = Wanted(settings=settings)
        done = ledger.read_done(wanted.items())
        tasks = [{"unit": unit, "settings": settings} for unit in wanted if unit not in done]
        if tasks:
            self._withdraw()
        results = run_units(
            tasks,
            EncodeTexts,
            constructor={"dataset_dir": self.store.root, "config": self.config},
            workers=self.config.workers,
            cpus=self.config.threads,
            gpus=self.config.encode.text_gpus,
        )
        progress = self._progress_from(len(self.units), before)
        run_stage(list(wanted), done, results, progress)
        if tasks:
            ledger.sweep(wanted)

    def _withdraw(self) -> None:
        """Take the manifest away: until all is published again, it and the shards may disagree."""
        self.store.delete(MANIFEST_FILE)

    def _progress_from(self, first: int, before: Mapping[str, float]) -> OnProgress | None:
        """Progress of one stage as part of the whole, behind `first` units."""
        tell = self.on_progress
        if tell is None:
            return None
        total = 2 * len(self.units) + 1

        def on_progress(done: int, _: int, counters: Mapping[str, float]) -> None:
            tell(first + done, total, {**before, **counters})

        return on_progress


def identity_in_dataset(source: str, identity: AutoencoderIdentity) -> AutoencoderIdentity:
    """Identity of an autoencoder as seen from the dataset: its copy there, or its name."""
    local = Path(source).is_dir()
    return identity.model_copy(update={"source": AUTOENCODER_FOLDER if local else source})


def adopt_autoencoder(store: Store, source: str, identity: AutoencoderIdentity) -> None:
    """Copy a local autoencoder into the dataset."""
    local = Path(source)
    if identity.source != AUTOENCODER_FOLDER:
        return
    if (local / "vae").is_dir():
        local = local / "vae"  # of a diffusers pipeline, only this part is needed
    if str(local.resolve()) != str(Path(store.uri(AUTOENCODER_FOLDER)).resolve()):
        store.put_folder(local, AUTOENCODER_FOLDER)
