"""Runs of the trainer for tests: in this process, or by several workers that torchrun starts."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from latent_dataset import train_settings
from processes import run

from training.config import TrainConfig
from training.job import TrainJob
from training.loop import train_loop
from training.metrics import read_metrics
from training.objective import make_flow_matching
from training.run import Run


class Crash(Exception):
    """What a test makes a run die of."""


def tiny_job(dataset, out, parent=None, **changes):
    """A job on :func:`latent_dataset.write_dataset` that takes seconds."""
    out = Path(out)
    settings = train_settings(**{"tracking": {"directory": str(out / "mlflow")}} | changes)
    config = TrainConfig.model_validate(settings)
    return TrainJob(
        config,
        config.model,
        config.partition,
        config.sampling,
        str(dataset),
        str(out),
        make_flow_matching,
        parent=parent,
    )


def train(dataset, out, crash_at=None, killed=(), **changes):
    """Train in this process; with `crash_at` the run dies before that step.

    It dies of an exception, or the workers `killed` of a SIGKILL.
    """
    train_step = Run._train_step

    def crashing(run, batches, stop):
        if run.step == crash_at:
            if not killed:
                raise Crash
            if run.world.rank in killed:
                os.kill(os.getpid(), signal.SIGKILL)
        return train_step(run, batches, stop)

    Run._train_step = crashing
    try:
        train_loop(tiny_job(dataset, out, **changes))
    except Crash:
        assert crash_at is not None
    finally:
        Run._train_step = train_step


WORKERS = """
import json, sys
import torch.distributed as dist
from training_runs import train
dist.init_process_group("gloo")
for arguments in json.loads(sys.argv[1]):
    train(**arguments)
dist.destroy_process_group()
"""


def train_together(folder, runs, workers=2, dies=False):
    """Train a list of runs (arguments of :func:`train`), one after the other, on `workers`.

    Returns:
        What the workers said.
    """
    script = Path(folder) / "workers.py"
    script.write_text(WORKERS)
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={workers}", str(script), json.dumps(runs, default=str)),
    ]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    status, said = run(*command, timeout=500, env=environment)
    assert (status != 0) == dies, said
    return said


def losses(out):
    """Loss by step, from the metrics file."""
    rows = read_metrics(Path(out) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
