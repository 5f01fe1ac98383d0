"""`curate` on Ray against the same function in plain loops: `python benchmarks/ingest.py`.

In one run, the rounds in turn over the same videos, each way into a dataset of its own: one plain
loop and Ray with one worker (what Ray costs); two plain processes with half of the units each and
Ray with two workers (how it scales). Processes, decoders and Ray are up before the clock starts.
Each process computes with one thread; the machine needs two cores that do nothing else. Options:
`--sources N`, `--seconds S` of each video, `--rounds N`.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np

from pipeline.config import IngestConfig
from pipeline.curate import make_curate_unit
from pipeline.graph import Row, ensure_ray, run_units
from pipeline.plan import Unit, extend_plan, read_plan, require_places, unit_tasks, write_plan
from pipeline.sources import list_sources

HEIGHT, WIDTH, FPS = 360, 640, 25
WARM_UNITS = 2

Way = Callable[[Sequence[Row], Path], None]
CONFIG = IngestConfig()


def write_videos(folder: Path, sources: int, seconds: float) -> None:
    """One moving texture in many files; a few bytes at the end make each a source of its own."""
    folder.mkdir()
    first = folder / "video-0.mp4"
    texture = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3), np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    with av.open(str(first), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for i in range(round(seconds * FPS)):
            picture = np.ascontiguousarray(np.roll(texture, 3 * i, axis=1)[:, :WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = first.read_bytes()
    for i in range(1, sources):
        (folder / f"video-{i}.mp4").write_bytes(content + i.to_bytes(8, "big"))


def plain_loop(tasks: Sequence[Row], dataset: Path) -> None:
    """The stage function, unit after unit."""
    stage = make_curate_unit(str(dataset), CONFIG)
    for task in tasks:
        list(stage(task))


def on_ray(workers: int) -> Way:
    """The stage function as `curate` runs it."""

    def run(tasks: Sequence[Row], dataset: Path) -> None:
        stage = make_curate_unit(str(dataset), CONFIG)
        done = list(run_units(tasks, stage, workers=workers))
        assert len(done) == len(tasks)

    return run


def in_processes(pools: Sequence[ProcessPoolExecutor]) -> Way:
    """A plain loop over a share of the units in each process."""

    def run(tasks: Sequence[Row], dataset: Path) -> None:
        shares = [tasks[i :: len(pools)] for i in range(len(pools))]
        loops = [
            pool.submit(plain_loop, share, dataset)
            for pool, share in zip(pools, shares, strict=True)
        ]
        for loop in loops:
            loop.result()

    return run


def measure(
    ways: dict[str, Way], plan: Sequence[Unit], folder: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after a round with a few units that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for number, (name, run) in enumerate(ways.items()):
            dataset = folder / f"data-{i}-{number}"
            write_plan(dataset, plan if i else plan[:WARM_UNITS])
            tasks = unit_tasks(require_places(dataset), (), settings="s", retry_dead=False)
            started = time.perf_counter()
            run(tasks, dataset)
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Print videos per second of each way, and the ratios."""
    parser = argparse.ArgumentParser(description="Curating on Ray against plain loops.")
    parser.add_argument("--sources", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="ingest-") as temporary,
        ProcessPoolExecutor(1, spawn) as first,
        ProcessPoolExecutor(1, spawn) as second,
    ):
        folder = Path(temporary)
        write_videos(folder / "videos", options.sources, options.seconds)
        sources = list_sources([str(folder / "videos")]).sources
        assert len(sources) == options.sources
        extend_plan(folder / "plan", sources, CONFIG.unit_sources)
        units = list(read_plan(folder / "plan"))
        ensure_ray()
        ways = {
            "plain loop": plain_loop,
            "Ray, 1 worker": on_ray(1),
            "2 plain processes": in_processes([first, second]),
            "Ray, 2 workers": on_ray(2),
        }
        times = measure(ways, units, folder, options.rounds)
    print(f"{options.sources} videos of {options.seconds:g} s, {WIDTH}x{HEIGHT}, on each way")
    for name, values in times.items():
        speed = options.sources / min(values)
        real_time = speed * options.seconds
        print(f"{name:18} {speed:6.2f} videos/s   {real_time:6.1f} s of video per second")
    for title, ours, other in (
        ("time of Ray with one worker / plain loop", "Ray, 1 worker", "plain loop"),
        ("speed of Ray with two workers / two processes", "2 plain processes", "Ray, 2 workers"),
    ):
        pairs = zip(times[ours], times[other], strict=True)
        print(f"{title}: {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
