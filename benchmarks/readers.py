"""Our shards beside WebDataset and MosaicML Streaming, over the same samples, read in turn.

    python benchmarks/readers.py [--clips 512] [--rounds 7] [--peer-python peers/bin/python]

The peers want other versions of packages that we use too, so they live in an environment of their
own, and what is missing there is named and left out:

    python -m venv peers && peers/bin/pip install webdataset mosaicml-streaming

The same bfloat16 latents of 1.5 MB are written by each format's own writer, with shards of one size
and no compression. Every reader, ours too, is a child process with one thread of PyTorch that
times itself and reads the way its library is used, except that nothing is read by other processes:

- ours: by row groups through the trainer's cache, CRC of every sample checked; shuffled in the
  trainer's order among `--shuffle-mb`
- webdataset, .pth: tensors that the library saves and decodes by itself; shuffled by shard and then
  by a buffer of `--shuffle-mb`
- webdataset, bytes: the same with raw bytes viewed as a tensor, the quickest that a tar allows
- mosaicml-streaming: an array column of 16-bit words, in a local folder; shuffled by its default,
  among all samples, each being read by itself

The peers check no sums. All convert each sample to float32, which a trainer needs and which reads
every byte. That all give the same samples, and in order the same sequence, is checked before
anything is timed. Opening a data set is not timed; files come from the system's cache, where a
reader's own cost shows most. Ratios are medians of the rounds' pairs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Children of the peers' environment run this file too: what is ours is imported where it is used.

SHAPE = (16, 12, 64, 64)
SAMPLE_BYTES = 2 * 16 * 12 * 64 * 64
ORDERS = ("in order", "shuffled")

Sample = tuple[str, Tensor]
"""Identity and bfloat16 latents of a clip."""
Epochs = Callable[[int], Iterator[Sample]]
"""All samples of an opened data set once, by number of the epoch."""


@dataclass(frozen=True)
class Job:
    """What a child is told."""

    reader: str
    order: str
    root: str
    clips: int
    shard_mb: float
    shuffle_mb: float

    @property
    def shuffled(self) -> bool:
        """Whether samples come shuffled."""
        return self.order == "shuffled"

    @property
    def folder(self) -> Path:
        """Where the reader's files lie."""
        return Path(self.root) / self.reader.replace(" ", "-")

    def samples(self) -> Iterator[Sample]:
        """What is to be written."""
        size = SAMPLE_BYTES // 2
        path = str(Path(self.root) / "raw")
        flat = torch.from_file(path, size=self.clips * size, dtype=torch.bfloat16)
        for number, latents in enumerate(flat.split(size)):
            yield f"{number:016x}", latents.reshape(SHAPE)


def write_ours(job: Job) -> None:
    from pipeline.config import ShardConfig
    from pipeline.latents import latent_row
    from pipeline.schema import LATENT_SCHEMA
    from pipeline.shards import ShardWriter
    from pipeline.store import open_store

    config = ShardConfig(shard_mb=job.shard_mb)
    store = open_store(job.folder)
    with ShardWriter(store, "latent", "u", "b", LATENT_SCHEMA, config) as writer:
        for clip, latents in job.samples():
            row = {"clip_id": clip, "source_id": clip, "frames": 4 * SHAPE[0]}
            writer.add(latent_row(row, latents))


def open_ours(job: Job) -> Epochs:
    import pyarrow.parquet as pq

    from training.order import BatchOrder
    from training.row_groups import RowGroups, read_tensor

    files = [str(path.relative_to(job.folder)) for path in sorted(job.folder.rglob("*.parquet"))]
    groups = [
        (file, group, metadata.row_group(group).num_rows)
        for file in files
        for metadata in [pq.read_metadata(job.folder / file)]
        for group in range(metadata.num_row_groups)
    ]
    addresses = [(file, group, row) for file, group, rows in groups for row in range(rows)]
    numbers = np.repeat(np.arange(len(groups)), [rows for *_, rows in groups])
    most = max(rows for *_, rows in groups) * SAMPLE_BYTES
    among = max(1, int(job.shuffle_mb * 1e6 / most))
    order = BatchOrder({"b": range(job.clips)}, job.clips, 0, numbers, among)

    def epoch(number: int) -> Iterator[Sample]:
        cache = RowGroups(job.folder, budget_bytes=int(1.5e6 * job.shuffle_mb))
        for place in order.batch(number) if job.shuffled else range(job.clips):
            row = cache.row(*addresses[place])
            yield row["clip_id"], read_tensor(row, "latent", addresses[place][0])

    return epoch


def write_tars(job: Job, kind: str) -> None:
    import webdataset

    pattern = str(job.folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=1e6 * job.shard_mb, verbose=0) as writer:
        for clip, latents in job.samples():
            # A view would be saved with all that it is a view of.
            value = (
                latents.clone() if kind == "pth" else latents.view(torch.uint8).numpy().tobytes()
            )
            writer.write({"__key__": clip, kind: value})


def open_tars(job: Job, kind: str) -> Epochs:
    import webdataset

    tars = [str(path) for path in sorted(job.folder.glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars) if job.shuffled else False)
    if job.shuffled:
        data = data.shuffle(max(1, int(1e6 * job.shuffle_mb / SAMPLE_BYTES)))
    if kind == "pth":
        data = data.decode()

    def epoch(number: int) -> Iterator[Sample]:
        for sample in data:
            value = sample[kind]
            if kind == "bin":
                value = torch.frombuffer(value, dtype=torch.bfloat16).reshape(SHAPE)
            yield sample["__key__"], value

    return epoch


def write_mds(job: Job) -> None:
    from streaming import MDSWriter

    columns = {"clip": "str", "latents": f"ndarray:uint16:{','.join(map(str, SHAPE))}"}
    limit = int(1e6 * job.shard_mb)
    with MDSWriter(out=str(job.folder), columns=columns, size_limit=limit) as writer:
        for clip, latents in job.samples():
            writer.write({"clip": clip, "latents": latents.view(torch.uint16).numpy()})


def open_mds(job: Job) -> Epochs:
    from streaming import StreamingDataset

    # One canonical node, or samples that are not shuffled would come interleaved.
    data = StreamingDataset(
        local=str(job.folder), shuffle=job.shuffled, batch_size=1, num_canonical_nodes=1
    )

    def epoch(number: int) -> Iterator[Sample]:
        for sample in data:
            yield sample["clip"], torch.from_numpy(sample["latents"]).view(torch.bfloat16)

    return epoch


@dataclass(frozen=True)
class Format:
    """How samples are written and read; with which package, None: with ours."""

    package: str | None
    write: Callable[[Job], None]
    open: Callable[[Job], Epochs]


READERS = {
    "ours": Format(None, write_ours, open_ours),
    "webdataset, .pth": Format(
        "webdataset", partial(write_tars, kind="pth"), partial(open_tars, kind="pth")
    ),
    "webdataset, bytes": Format(
        "webdataset", partial(write_tars, kind="bin"), partial(open_tars, kind="bin")
    ),
    "mosaicml-streaming": Format("mosaicml-streaming", write_mds, open_mds),
}


def serve(job: Job) -> None:
    """Do what the parent asks for on standard input, a line of JSON for every line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*not writable")
    chosen = READERS[job.reader]
    epochs: Epochs | None = None
    number = 0
    for line in sys.stdin:
        answer: Any = None
        if line.strip() == "write":
            job.folder.mkdir()
            chosen.write(job)
        elif line.strip() == "version":
            answer = importlib.metadata.version(chosen.package or "streamdit")
        else:
            epochs = epochs or chosen.open(job)
            if line.strip() == "check":
                answer = [(clip, checksum(latents)) for clip, latents in epochs(number)]
            else:
                answer = seconds_of(epochs(number), job.clips)
            number += 1
        print(json.dumps(answer), file=answers, flush=True)


def checksum(latents: Tensor) -> int:
    assert latents.dtype == torch.bfloat16
    assert latents.shape == SHAPE
    return zlib.crc32(latents.view(torch.uint8).numpy())


def seconds_of(samples: Iterator[Sample], clips: int) -> float:
    started = time.perf_counter()
    read = sum(latents.float().shape == SHAPE for _, latents in samples)
    elapsed = time.perf_counter() - started
    assert read == clips, f"{read} samples instead of {clips}"
    return elapsed


class Child:
    """A reader in a process of its own, of the interpreter that has its package."""

    def __init__(self, job: Job, peer_python: str) -> None:
        self.name = job.reader
        peer = READERS[job.reader].package is not None
        # Isolated, since our packages and the files beside this one are none of the peer's.
        command = [peer_python, "-I"] if peer else [sys.executable]
        self._process = subprocess.Popen(
            [*command, __file__, "--serve", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, what: str) -> Any:
        """The answer to one line."""
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process ended when asked to {what}; see above")
        return json.loads(answer)


def present(peer_python: str | None) -> list[str]:
    """Readers that can run; names the others, and why."""
    names = []
    for name, chosen in READERS.items():
        if chosen.package is not None:
            if peer_python is None:
                print(f"{name}: left out, no --peer-python")
                continue
            find = "import sys, importlib.metadata as m; m.version(sys.argv[1])"
            command = [peer_python, "-I", "-c", find, chosen.package]
            if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
                print(f"{name}: left out, {peer_python} has no {chosen.package}")
                continue
        names.append(name)
    return names


def make_samples(root: str, clips: int) -> list[list]:
    """Write random latents as raw bytes; returns identity and checksum of each, in order."""
    generator = torch.Generator().manual_seed(0)
    made = []
    with (Path(root) / "raw").open("wb") as file:
        for number in range(clips):
            latents = torch.randn(SHAPE, generator=generator).bfloat16()
            file.write(latents.view(torch.uint8).numpy())
            made.append([f"{number:016x}", checksum(latents)])
    return made


def measure(children: list[Child], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by reader; who begins turns from round to round."""
    seconds: dict[str, list[float]] = {child.name: [] for child in children}
    for number in range(rounds):
        first = number % len(children)
        for child in children[first:] + children[:first]:
            seconds[child.name].append(child.ask("time"))
    return seconds


def report(order: str, seconds: dict[str, list[float]], megabytes: float) -> None:
    print(f"\n| {order} | MB/s, median | speed of ours ÷ this | least … most |\n|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [other / own for own, other in zip(seconds["ours"], times, strict=True)]
        print(
            f"| {name} | {megabytes / statistics.median(times):.0f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} … {max(ratios):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shard-mb", type=float, default=128.0)
    parser.add_argument("--shuffle-mb", type=float, default=256.0)
    parser.add_argument("--peer-python", help="interpreter of an environment with the peers")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(Job(**json.loads(options.serve)))
    names = present(options.peer_python)
    with tempfile.TemporaryDirectory(prefix="readers-") as root:
        expected = make_samples(root, options.clips)
        megabytes = options.clips * SAMPLE_BYTES / 1e6
        print(
            f"{options.clips} clips, {megabytes:.0f} MB, shards of {options.shard_mb:.0f} MB, "
            f"shuffled among {options.shuffle_mb:.0f} MB, {options.rounds} rounds, "
            f"PyTorch {torch.__version__}, Python {platform.python_version()}"
        )
        for order in ORDERS:
            with ExitStack() as stack:
                size = (options.clips, options.shard_mb, options.shuffle_mb)
                jobs = [Job(name, order, root, *size) for name in names]
                children = [
                    stack.enter_context(Child(job, options.peer_python or "")) for job in jobs
                ]
                for child in children:
                    if order == ORDERS[0]:
                        child.ask("write")
                        print(f"{child.name}: {child.ask('version')}")
                    read = child.ask("check")
                    assert sorted(read) == expected, f"{child.name} gives other samples"
                    assert (read == expected) == (order == ORDERS[0]), f"{child.name}: wrong order"
                report(order, measure(children, options.rounds), megabytes)


if __name__ == "__main__":
    main()
