"""How fast latents come off the disk: the trainer's loader against a raw read of the same shards.

    python benchmarks/loader_speed.py [--preset small] [--clips 256] [--rounds 5]

The raw read goes through the files in order with `ParquetFile.iter_batches` and looks at nothing;
the loader takes the clips in training order, checks their CRCs, normalises them in float32 and puts
batches together. They take turns, each over as many clips; the ratio is the median over rounds.
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
from training.config import TrainConfig
from training.data import BatchLoader, BatchOrder, LatentDataset


def raw_read(root: Path) -> int:
    """Read every latent and text row once, in the order of the files; returns bytes."""
    read = 0
    for path in sorted([*root.glob("latents/*.parquet"), *root.glob("text/*.parquet")]):
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            read += sum(batch.nbytes for batch in parquet.iter_batches(batch_size=16))
    return read


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
            order = BatchOrder(dataset.buckets, options.batch, seed=epoch)
            loader = BatchLoader(dataset, order, model.buffer_frames, 0, 1, options.batch)
            started = time.perf_counter()
            clips = sum(len(batch.clip_ids) for step in loader.steps(0, steps) for batch in step)
            times["loader"].append(time.perf_counter() - started)
    assert clips == steps * options.batch
    raw, ours = (times[name][1:] for name in ("raw", "loader"))
    print(f"{options.preset}: {clips} clips, {size / clips / 1e6:.2f} MB each, uncompressed")
    print("| | clips/s | MB/s |\n|---|---|---|")
    for name, seconds in (("raw Parquet read", raw), ("the trainer's loader", ours)):
        median = statistics.median(seconds)
        print(f"| {name} | {clips / median:.0f} | {size / median / 1e6:.0f} |")
    ratio = statistics.median(b / a for a, b in zip(raw, ours, strict=True))
    print(f"loader / raw read, time per clip: {ratio:.2f}")


if __name__ == "__main__":
    main()
