"""Whether a killed training goes on as if nothing had happened: every way of dying, in one table.

    python benchmarks/exact_resume.py [--steps 8]

Each row trains twice, on random latents in float32 on CPUs: without a break, and killed with
`kill -9` after a checkpoint and continued. Compared are the losses of every step, as they are
printed, and the exported weights.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from made_up_latents import make_dataset
from safetensors.torch import load_file

from jobs.config import load_config
from training.config import TrainConfig
from training.job import TrainJob
from training.loop import train_loop
from training.metrics import read_metrics
from training.objective import make_flow_matching
from training.run import Run

SETTINGS = (
    "model.width=64",
    "model.depth=2",
    "model.heads=4",
    "model.ffn_width=128",
    "global_batch=8",
    "precision=float32",
    "validation.samples=0",
    "checkpoint.every=2",
    "log_every=1",
)


@dataclass(frozen=True)
class Case:
    """A way of dying and going on: ZeRO stage, workers, ranks killed, workers afterwards."""

    stage: int
    workers: int
    killed: tuple[int, ...]
    after: int


CASES = (
    *(Case(stage, 2, killed, 2) for stage in (1, 2, 3) for killed in ((1,), (0, 1))),
    *(
        Case(stage, workers, tuple(range(workers)), 3 - workers)
        for stage in (1, 2, 3)
        for workers in (1, 2)
    ),
)


def train(dataset: str, out: str, stage: int, steps: int, killed: list[int], at: int) -> None:
    """What each worker does."""
    if killed:
        train_step = Run._train_step

        def deadly_step(run: Run, *arguments: Any) -> Any:
            if run.step == at and run.world.rank in killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(run, *arguments)

        Run._train_step = deadly_step  # type: ignore[method-assign]
    settings = [f"zero_stage={stage}", f"steps={steps}", f"tracking.directory={out}/mlflow"]
    config = load_config(
        TrainConfig, stage="train", preset="demo", overrides=[*SETTINGS, *settings]
    )
    train_loop(
        TrainJob(
            config,
            config.model,
            config.partition,
            config.sampling,
            dataset,
            out,
            make_flow_matching,
        )
    )


def start(workers: int, **arguments: Any) -> int:
    """Train on `workers` that torchrun starts; returns its status."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={workers}", __file__, "--worker", json.dumps(arguments)),
    ]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not arguments["killed"]:
        raise RuntimeError(done.stderr)
    return done.returncode


def losses(out: Path) -> list[float]:
    """Loss of every step."""
    rows = {
        row["step"]: row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row
    }
    return [rows[step] for step in sorted(rows)]


def row_of(case: Case, folder: Path, dataset: Path, steps: int) -> str:
    """A line of the table."""
    common = {"dataset": str(dataset), "stage": case.stage, "steps": steps, "at": steps - 1}
    straight = folder / f"straight-{case.stage}-{case.workers}"
    if not (straight / "model").exists():
        start(case.workers, out=str(straight), killed=[], **common)
    name = "-".join(map(str, (case.stage, case.workers, *case.killed, case.after)))
    broken = folder / f"broken-{name}"
    assert start(case.workers, out=str(broken), killed=list(case.killed), **common) != 0
    start(case.after, out=str(broken), killed=[], **common)
    curves = [losses(out) for out in (straight, broken)]
    weights = [load_file(out / "model" / "model.safetensors") for out in (straight, broken)]
    assert [len(curve) for curve in curves] == [steps, steps]
    apart = max(abs(a - b) / a for a, b in zip(*curves, strict=True))
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    dead = "all" if len(case.killed) == case.workers else f"rank {case.killed[0]}"
    verdict = "equal in every digit" if curves[0] == curves[1] else f"within {apart:.0e}"
    return (
        f"| {case.stage} | {case.workers} | {dead} | {case.after} | {verdict} | "
        f"{'equal in every bit' if same else 'not bit for bit'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(**json.loads(options.worker))
        return
    config = load_config(TrainConfig, stage="train", preset="demo", overrides=SETTINGS)
    print("| ZeRO stage | workers | killed | workers afterwards | losses | weights |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder) / "dataset", config.model, clips=64)
        for case in CASES:
            print(row_of(case, Path(folder), dataset, options.steps), flush=True)


if __name__ == "__main__":
    main()
