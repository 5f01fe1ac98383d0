"""Latent shards against plain PyArrow and raw bytes: `python benchmarks/shards.py [ROWS]`.

In turn, in the same folder: rows of 1.5 MB through our writer (hash included), through one
`pyarrow.parquet` writer with the same options, and as raw bytes into a file; then each read back by
row groups. Every reader makes what a trainer takes, float32 tensors in memory of their own. The raw
reader takes the same bytes in pieces of the same size, each into fresh memory or all into one
buffer (which a cache of row groups cannot do), and views each row as bfloat16. Files come from the
system's cache, where a reader's own cost shows most. Megabytes of bfloat16 per second in the median
round, ratios as the median of paired rounds; memory as the growth of the process while reading, and
the peak of Arrow's pool while writing.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import ShardConfig
from pipeline.latents import latent_row
from pipeline.schema import LATENT_SCHEMA, decode_tensor
from pipeline.shards import ShardWriter
from pipeline.store import open_store
from training.row_groups import RowGroups, read_tensor

ROUNDS = 15
SHAPE = (16, 12, 64, 64)
"""Of a latent: 1.5 MB in bfloat16."""
GROUP = 16
"""Rows of a row group."""

Row = dict


def make_rows(count: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    clips = [{"clip_id": f"{i:016x}", "source_id": "s", "frames": 64} for i in range(count)]
    return [latent_row(c, torch.randn(SHAPE, generator=generator).bfloat16()) for c in clips]


def write_ours(rows: list[Row], folder: Path, compression: str = "none") -> None:
    config = ShardConfig(
        row_group_mb=GROUP * len(rows[0]["latent"]) / 1e6, shard_mb=1e6, compression=compression
    )
    store = open_store(folder)
    with ShardWriter(store, "latent", "u", compression, LATENT_SCHEMA, config) as writer:
        for row in rows:
            writer.add(row)


def write_zstd(rows: list[Row], folder: Path) -> None:
    write_ours(rows, folder, "zstd")


def write_plain(rows: list[Row], folder: Path) -> None:
    options = {"compression": "none", "use_dictionary": False}
    with pq.ParquetWriter(folder / "plain.parquet", LATENT_SCHEMA, **options) as writer:
        for first in range(0, len(rows), GROUP):
            writer.write_table(pa.Table.from_pylist(rows[first : first + GROUP], LATENT_SCHEMA))


def write_raw(rows: list[Row], folder: Path) -> None:
    with (folder / "raw").open("wb") as file:
        for row in rows:
            file.write(row["latent"])


def read_ours(rows: list[Row], folder: Path, compression: str = "none") -> Iterator[torch.Tensor]:
    groups = RowGroups(folder, budget_bytes=1)
    path = f"latents/latent-u-{compression}-00000.parquet"
    for number in range(len(rows)):
        row = groups.row(path, *divmod(number, GROUP))
        yield read_tensor(row, "latent", path).float()


def read_zstd(rows: list[Row], folder: Path) -> Iterator[torch.Tensor]:
    return read_ours(rows, folder, "zstd")


def read_plain(rows: list[Row], folder: Path) -> Iterator[torch.Tensor]:
    with pq.ParquetFile(folder / "plain.parquet", pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                yield decode_tensor(row["latent"], SHAPE, "bfloat16").float()


def read_raw(rows: list[Row], folder: Path, reuse: bool = False) -> Iterator[torch.Tensor]:
    size = len(rows[0]["latent"])
    piece = torch.empty(GROUP * size, dtype=torch.uint8)
    with (folder / "raw").open("rb", buffering=0) as file:
        for _ in range(0, len(rows), GROUP):
            piece = piece if reuse else torch.empty(GROUP * size, dtype=torch.uint8)
            read = file.readinto(memoryview(piece.numpy()))
            for start in range(0, read, size):
                yield piece[start : start + size].view(torch.bfloat16).reshape(SHAPE).float()


def read_raw_again(rows: list[Row], folder: Path) -> Iterator[torch.Tensor]:
    return read_raw(rows, folder, reuse=True)


def drain(reader: Callable[[list[Row], Path], Iterator[torch.Tensor]]) -> Callable:
    def read(rows: list[Row], folder: Path) -> None:
        assert sum(1 for _ in reader(rows, folder)) == len(rows)

    return read


WAYS: dict[str, dict[str, Callable[[list[Row], Path], None]]] = {
    "write": {
        "ours": write_ours,
        "ours, zstd": write_zstd,
        "plain PyArrow": write_plain,
        "raw bytes": write_raw,
    },
    "read": {
        "ours, with CRC": drain(read_ours),
        "ours, zstd": drain(read_zstd),
        "plain PyArrow": drain(read_plain),
        "raw, fresh memory": drain(read_raw),
        "raw, one buffer": drain(read_raw_again),
    },
}


def main() -> None:
    rows = make_rows(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
    megabytes = sum(len(row["latent"]) for row in rows) / 1e6
    folder = Path(tempfile.mkdtemp(prefix="shards-"))
    try:
        write_ours(rows, folder)
        peak = pa.default_memory_pool().max_memory() / 1e6
        print(f"{len(rows)} rows, {megabytes:.0f} MB, row groups of {GROUP} rows")
        print(f"peak of Arrow's memory while writing: {peak:.0f} MB")
        before = psutil.Process().memory_info().rss
        grown = 0
        for _ in read_ours(rows, folder):
            grown = max(grown, psutil.Process().memory_info().rss - before)
        print(f"growth of the process while reading: {grown / 1e6:.0f} MB")
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
                speed = megabytes / statistics.median(times)
                print(f"{title:6} {name:17} {speed:7.0f} MB/s   speed of ours / this {ratio:.2f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
