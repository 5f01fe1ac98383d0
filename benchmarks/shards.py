"""Latent shards against plain PyArrow and raw bytes: `python benchmarks/shards.py [ROWS]`.

In turn, in the same folder: rows of 1.5 MB through our writer (hash included), through one
`pyarrow.parquet` writer with the same options, and as raw bytes into a file; then each read back,
ours checked by CRC. Megabytes per second as the best round, ratios as the median of paired rounds;
memory as the peak of Arrow's pool while our writer wrote.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import ShardConfig
from pipeline.latents import latent_row
from pipeline.schema import LATENT_SCHEMA
from pipeline.shards import ShardWriter
from pipeline.store import open_store
from training.row_groups import read_tensor

ROUNDS = 5
SHAPE = (16, 12, 64, 64)
"""Of a latent: 1.5 MB in bfloat16."""
GROUP = 16
"""Rows of a row group."""

Row = dict


def make_rows(count: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    clips = [{"clip_id": f"{i:016x}", "source_id": "s", "frames": 64} for i in range(count)]
    return [latent_row(c, torch.randn(SHAPE, generator=generator).bfloat16()) for c in clips]


def write_ours(rows: list[Row], folder: Path) -> None:
    config = ShardConfig(row_group_mb=GROUP * len(rows[0]["latent"]) / 1e6, shard_mb=1e6)
    with ShardWriter(open_store(folder), "latent", "u", "b", LATENT_SCHEMA, config) as writer:
        for row in rows:
            writer.add(row)


def write_plain(rows: list[Row], folder: Path) -> None:
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False}
    with pq.ParquetWriter(folder / "plain.parquet", LATENT_SCHEMA, **options) as writer:
        for first in range(0, len(rows), GROUP):
            writer.write_table(pa.Table.from_pylist(rows[first : first + GROUP], LATENT_SCHEMA))


def write_raw(rows: list[Row], folder: Path) -> None:
    with (folder / "raw").open("wb") as file:
        for row in rows:
            file.write(row["latent"])


def read_ours(rows: list[Row], folder: Path) -> None:
    (path,) = (folder / "latents").glob("*.parquet")
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                read_tensor(row, "latent", path.name)


def read_plain(rows: list[Row], folder: Path) -> None:
    with pq.ParquetFile(folder / "plain.parquet") as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group)


def read_raw(rows: list[Row], folder: Path) -> None:
    with (folder / "raw").open("rb") as file:
        while file.read(len(rows[0]["latent"])):
            pass


WAYS: dict[str, dict[str, Callable[[list[Row], Path], None]]] = {
    "write": {"ours": write_ours, "plain PyArrow": write_plain, "raw bytes": write_raw},
    "read": {"ours, with CRC": read_ours, "plain PyArrow": read_plain, "raw bytes": read_raw},
}


def main() -> None:
    rows = make_rows(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
    megabytes = sum(len(row["latent"]) for row in rows) / 1e6
    folder = Path(tempfile.mkdtemp(prefix="shards-"))
    try:
        write_ours(rows, folder)
        peak = pa.default_memory_pool().max_memory() / 1e6
        print(f"{len(rows)} rows, {megabytes:.0f} MB, row groups of {GROUP} rows")
        for title, ways in WAYS.items():
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    started = time.perf_counter()
                    way(rows, folder)
                    seconds[name].append(time.perf_counter() - started)
            ours = next(iter(seconds.values()))
            for name, times in seconds.items():
                ratio = statistics.median(other / o for o, other in zip(ours, times, strict=True))
                speed = megabytes / min(times)
                print(f"{title:6} {name:16} {speed:7.0f} MB/s   speed of ours / this {ratio:.2f}")
        print(f"peak of Arrow's memory while writing: {peak:.0f} MB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
