"""What a clip costs the drivers in memory: `python benchmarks/driver_memory.py`.

Datasets of few and of many clips are made up, every unit of which is done (shards hold no latents,
only rows). In a fresh process near duplicates are compared, `encode` finds nothing to do and
publishes, a selection is tried and published, and the dataset is verified: first of the smallest
dataset until that takes no further memory (what threads and allocators keep for themselves), then
of each; printed is the peak of resident memory, and its growth per clip. All threads allocate from
one heap, for how much their own heaps keep differs from run to run by more than the clips take.
Options: `--units N...` (of 128 clips), `--rows N` (of a portion of the index), `--readers N` (units
read at once).
"""

import argparse
import hashlib
import itertools
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import pipeline.encode as encode_job
import pipeline.reselect as reselect_job
from pipeline import check, duplicate_table, index, ledger
from pipeline.annotate import annotate_settings, annotate_wanted
from pipeline.catalogue import Source
from pipeline.check import check_dataset
from pipeline.config import IngestConfig
from pipeline.curate import curate_settings, curate_wanted
from pipeline.duplicate_table import update_duplicates
from pipeline.encode import adopt_autoencoder, encode, identity_in_dataset
from pipeline.ledger import READERS, Ledger, Wanted
from pipeline.pending import LATENTS, TEXT, TextWork, latent_settings, text_settings
from pipeline.plan import Unit, read_plan, write_plan
from pipeline.reselect import preview, reselect
from pipeline.schema import (
    ANNOTATION_SCHEMA,
    AUTOENCODER_FOLDER,
    CLIP_SCHEMA,
    LATENT_SCHEMA,
    NULL_TEXT_FILE,
    SOURCE_SCHEMA,
    text_schema,
)
from pipeline.settings import adopt_settings
from pipeline.shards import file_name, write_table
from pipeline.stage_text import NULL_UNIT
from pipeline.store import DiskStore
from streamdit.autoencoder import (
    CausalAutoencoder,
    CausalAutoencoderConfig,
    load_autoencoder,
    save_autoencoder,
)
from streamdit.config import AutoencoderIdentity

SOURCES, CLIPS = 8, 16
"""Sources of a unit, and clips of each."""
BUCKET = "16x32x32"
CAPTION = "a caption as long as captions are, that tells what is to be seen, and how it moves; " * 3
COPIES = 0.2
"""Share of clips that look like the one before."""
WARMING = 2
ONE_HEAP = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
CONFIG = IngestConfig.model_validate(
    {
        "clip": {"frames": 16, "fps": 16, "height": 32, "width": 32},
        "text_encoders": [{"name": "bytes", "kind": "bytes", "width": 16, "max_tokens": 48}],
    }
)


def make_dataset(root: Path, autoencoder: str, units: int) -> None:
    """Tables and markers as the jobs write them, without a video."""
    store = DiskStore(str(root))
    identity = identity_in_dataset(autoencoder, load_autoencoder(autoencoder).identity)
    settings = {
        "curate": curate_settings(CONFIG),
        "annotate": annotate_settings(CONFIG),
        LATENTS: latent_settings(CONFIG, identity),
        TEXT: text_settings(CONFIG),
    }
    prints = {
        stage: adopt_settings(store, {stage: values}, CONFIG, _owner(stage, identity))[stage]
        for stage, values in settings.items()
    }
    adopt_autoencoder(store, autoencoder, identity)
    plan = [_unit(number) for number in range(units)]
    write_plan(store, plan)
    random = np.random.default_rng(0)
    for unit in plan:
        _write_unit(store, unit, prints, random)
    names = [unit.name for unit in plan]
    null = {"clip_id": "", "caption": "", "caption_model": ""}
    record = write_table(store, NULL_TEXT_FILE, "text-null", [null], text_schema(["bytes"]))
    Ledger(store, TEXT).finish(NULL_UNIT, Wanted(settings=prints[TEXT]), [record])
    for name in names:
        shard = file_name("text", name, BUCKET)
        work = TextWork.find(store, name)
        rows = [row for _, captions in work.shards for row in captions]
        record = write_table(store, shard, "text", rows, text_schema(["bytes"]))
        Ledger(store, TEXT).finish(name, work.wanted(prints[TEXT]), [record])


def _owner(stage: str, identity: AutoencoderIdentity) -> AutoencoderIdentity | None:
    return identity if stage in (LATENTS, TEXT) else None


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _unit(number: int) -> Unit:
    sources = (
        Source(_digest(number, i), f"/videos/{number:06d}/{i:02d}.mp4", 1000, ())
        for i in range(SOURCES)
    )
    return Unit(_digest(number)[:12], tuple(sources))


def _write_unit(
    store: DiskStore, unit: Unit, prints: dict[str, str], random: np.random.Generator
) -> None:
    """All of a unit but its text."""
    sources = [
        {"source_id": s.source_id, "uri": s.uri, "width": 1280, "height": 720, "duration_s": 60.0}
        for s in unit.sources
    ]
    clips = [_clip(source, i, random) for source in unit.sources for i in range(CLIPS)]
    for before, clip in itertools.pairwise(clips):
        if random.random() < COPIES:
            clip["phash"] = before["phash"]
    clips.sort(key=lambda clip: str(clip["clip_id"]))
    notes = [
        {"clip_id": c["clip_id"], "caption": CAPTION, "caption_model": "m", "caption_status": "ok"}
        for c in clips
    ]
    files = [
        write_table(store, file_name("source", unit.name), "source", sources, SOURCE_SCHEMA),
        write_table(store, file_name("clip", unit.name), "clip", clips, CLIP_SCHEMA),
    ]
    counters = {"sources": len(sources), "clips": len(clips)}
    wanted = curate_wanted(unit, prints["curate"])
    Ledger(store, "curate").finish(unit.name, wanted, files, counters)
    path = file_name("annotation", unit.name)
    note = write_table(store, path, "annotation", notes, ANNOTATION_SCHEMA)
    wanted = annotate_wanted(store, unit, CONFIG, prints["annotate"])
    Ledger(store, "annotate").finish(unit.name, wanted, [note], {"clips": len(clips)})
    rows = [{"clip_id": clip["clip_id"], "latent": b""} for clip in clips]
    shard = write_table(
        store, file_name("latent", unit.name, BUCKET), "latent", rows, LATENT_SCHEMA
    )
    wanted = Wanted(settings=prints[LATENTS])
    Ledger(store, LATENTS).finish(unit.name, wanted, [shard], {"clips": len(clips)})


def _clip(source: Source, number: int, random: np.random.Generator) -> dict[str, object]:
    return {
        "clip_id": _digest(source.source_id, number),
        "source_id": source.source_id,
        "uri": source.uri,
        "start_s": float(number),
        "end_s": number + 1.0,
        "fps": 16.0,
        "bucket": BUCKET,
        "frames": 16,
        "height": 32,
        "width": 32,
        "scene": 0,
        "motion": float(random.random()),
        "phash": random.bytes(24).hex(),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drive(root: Path, autoencoder: str) -> int:
    """Run the drivers over a dataset; returns its clips."""
    store = DiskStore(str(root))
    units = [unit.name for unit in read_plan(store)]
    update_duplicates(store, units, CONFIG.scores.duplicate_bits)
    clips = encode(root, autoencoder, CONFIG).clips
    assert clips == len(units) * SOURCES * CLIPS, "everything was meant to be selected"
    expression = "motion > 0.1 and not duplicate"
    assert preview(root, expression).selected == reselect(root, expression).rows < clips
    assert not check_dataset(root).problems
    return clips


def measure(roots: list[Path], autoencoder: str) -> None:
    """Print the peak of each dataset, and the growth from the first to the last."""
    for _ in range(WARMING):
        drive(roots[0], autoencoder)
    peaks = []
    for root in roots:
        clips = drive(root, autoencoder)
        peaks.append((clips, peak_bytes()))
        print(f"{clips:9,} clips   peak {peaks[-1][1] / 1e6:6.0f} MB")
    (few, low), *_, (many, high) = peaks
    print(f"{(high - low) / (many - few):.0f} B for each further clip")


def prepare(folder: Path, units: list[int]) -> list[str]:
    """Make the datasets; returns the arguments of a process that measures them."""
    os.fsync = lambda _: None  # nobody needs these files after a crash
    autoencoder = CausalAutoencoder(
        CausalAutoencoderConfig(
            latent_channels=4,
            patch=(4, 8, 8),
            widths=(8,),
            strides=(),
            encoder_blocks=(1,),
            decoder_blocks=(1,),
        )
    )
    where = str(folder / AUTOENCODER_FOLDER)
    save_autoencoder(autoencoder, where)
    roots = [folder / str(count) for count in units]
    for root, count in zip(roots, units, strict=True):
        make_dataset(root, where, count)
    return ["--autoencoder", where, "--measure", *map(str, roots)]


def main() -> None:
    """Measure in a process of its own, which has made nothing."""
    parser = argparse.ArgumentParser(description="Memory of the drivers as a dataset grows.")
    parser.add_argument("--units", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rows", type=int, default=index.ROW_GROUP)
    parser.add_argument("--readers", type=int, default=READERS)
    parser.add_argument("--measure", type=Path, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--autoencoder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        index.ROW_GROUP = options.rows
        for module in (check, duplicate_table, encode_job, index, ledger, reselect_job):
            module.READERS = options.readers
        measure(options.measure, options.autoencoder)
        return
    sizes = ["--rows", str(options.rows), "--readers", str(options.readers)]
    with tempfile.TemporaryDirectory(prefix="driver-memory-") as temporary:
        arguments = prepare(Path(temporary), options.units)
        command = [sys.executable, __file__, *sizes, *arguments]
        subprocess.run(command, check=True, env={**os.environ, **ONE_HEAP})


if __name__ == "__main__":
    main()
