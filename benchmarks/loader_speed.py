"""How fast latents come off the disk: the trainer's loader against a raw read of the same shards.

    python benchmarks/loader_speed.py [--preset small] [--clips 256] [--rounds 5]

The raw read goes through the files in order with `ParquetFile.iter_batches` and looks at nothing;
the loader takes the clips in training order, checks their CRCs, normalises them in float32 and puts
batches together. They take turns, each over as many clips; the ratio is the median over rounds.

Then bytes: what an epoch reads in all, over the size of the data set, where memory holds an eighth
of it; for a shuffle of all clips, and for the trainer's among row groups of two thirds of that
memory; by one worker, and by one of eight that share out each batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from made_up_latents import make_dataset

from jobs.config import load_config
from streamdit.config import DiTConfig
from training.config import RunConfig, TrainConfig
from training.data import LatentDataset
from training.loader import BatchLoader
from training.order import BatchOrder


def raw_read(root: Path) -> int:
    """Read every latent and text row once, in the order of the files; returns bytes."""
    read = 0
    for path in sorted([*root.glob("latents/*.parquet"), *root.glob("text/*.parquet")]):
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            read += sum(batch.nbytes for batch in parquet.iter_batches(batch_size=16))
    return read


def read_amplification(
    root: Path, model: DiTConfig, options: argparse.Namespace, whole: bool, workers: int
) -> float:
    """Bytes that one of `workers` reads in an epoch, over the size of all shards."""
    size = raw_read(root)
    dataset = LatentDataset(root, "train", cache_bytes=size // 8)
    among = 1 if whole else dataset.groups_in(size / 8 / 1.5 / 2**20)
    groups = None if whole else dataset.row_groups
    order = BatchOrder(dataset.buckets, options.batch, 0, groups, among)
    loader = BatchLoader(dataset, order, model.buffer_frames, 0, workers, options.batch // workers)
    for _ in loader.steps(0, len(dataset) // options.batch):
        pass
    return dataset.read_bytes / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = load_config(TrainConfig, stage="train", preset=options.preset).model
    with tempfile.TemporaryDirectory() as folder:
        root = make_dataset(Path(folder) / "dataset", model, options.clips)
        times: dict[str, list[float]] = {"raw": [], "loader": []}
        steps = options.clips // options.batch
        for epoch in range(options.rounds + 1):
            started = time.perf_counter()
            size = raw_read(root)
            times["raw"].append(time.perf_counter() - started)
            dataset = LatentDataset(root, "train")  # anew, for an empty cache
            order = BatchOrder(
                dataset.buckets,
                options.batch,
                epoch,
                dataset.row_groups,
                dataset.groups_in(RunConfig.model_fields["shuffle_mb"].default),
            )
            loader = BatchLoader(dataset, order, model.buffer_frames, 0, 1, options.batch)
            started = time.perf_counter()
            clips = sum(len(batch.clip_ids) for step in loader.steps(0, steps) for batch in step)
            times["loader"].append(time.perf_counter() - started)
        amplification = {
            name: [read_amplification(root, model, options, whole, n) for n in (1, 8)]
            for name, whole in (("shuffle of all clips", True), ("the trainer's shuffle", False))
        }
    assert clips == steps * options.batch
    raw, ours = (times[name][1:] for name in ("raw", "loader"))
    print(f"{options.preset}: {clips} clips, {size / clips / 1e6:.2f} MB each, uncompressed")
    print("| | clips/s | MB/s |\n|---|---|---|")
    for name, seconds in (("raw Parquet read", raw), ("the trainer's loader", ours)):
        median = statistics.median(seconds)
        print(f"| {name} | {clips / median:.0f} | {size / median / 1e6:.0f} |")
    ratio = statistics.median(b / a for a, b in zip(raw, ours, strict=True))
    print(f"loader / raw read, time per clip: {ratio:.2f}")
    print("| bytes read in an epoch / size | 1 worker | each of 8 |\n|---|---|---|")
    for name, cells in amplification.items():
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
