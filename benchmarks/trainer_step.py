"""What the trainer costs: its step against bare loops with the same model, batch and precision.

    python benchmarks/trainer_step.py [--preset demo] [--turns 8] [KEY=VALUE ...]
    torchrun --nproc-per-node 2 benchmarks/trainer_step.py

Three loops take turns in one process group, a few steps each: the trainer as it is (data from
shards, draws, averaging, stop request, metrics, log lines), a bare DeepSpeed loop, and a bare
PyTorch loop (DistributedDataParallel, AdamW, gradient clipping). The bare loops repeat one batch
with its draws and do nothing else. Times of the trainer are whole turns of its loop, so what it
does between steps counts. The first step of a turn is not counted, of any: what the trainer reads
ahead, and its writers, may have worked beside the loop before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from made_up_run import make_job, make_run

from streamdit.model import build_dit
from training.data import Batch
from training.engine import World, build_engine, fused_by_default, join_world
from training.job import TrainJob
from training.objective import make_flow_matching, stack_draws
from training.order import sample_generator
from training.run import Run
from training.stop import StopRequest

TURN = 6
"""Steps of a loop's turn, of which the first is not counted."""
WARM_UP = 1
"""Turns that are not counted."""
SMALL = ("global_batch=8", "micro_batch=null")


class InterleavedRun(Run):
    """The trainer, with a turn for each bare loop before every step of its own."""

    def prepare(self, peers: dict[str, Callable[[], None]]) -> None:
        """Take the bare loops in, by name."""
        self.peers = peers
        self.turns: dict[str, list[list[float]]] = {name: [] for name in ("trainer", *peers)}
        self.mine: list[float] = []
        self.began: float | None = None

    def _train_step(self, *arguments: Any) -> Any:
        """A step; every few of them, the peers' turns come before it."""
        if self.began is not None:
            self.mine.append(now(self.world) - self.began)
        if len(self.mine) == TURN:
            self.turns["trainer"].append(self.mine[1:])
            self.mine = []
            names = list(self.peers)
            first = len(self.turns["trainer"]) % len(names)
            for name in names[first:] + names[:first]:
                self.turns[name].append(self._turn_of(self.peers[name]))
        self.began = now(self.world)
        return super()._train_step(*arguments)

    def _turn_of(self, step: Callable[[], None]) -> list[float]:
        """Seconds of the steps of a peer's turn but the first."""
        seconds = []
        for _ in range(TURN):
            started = now(self.world)
            step()
            seconds.append(now(self.world) - started)
        return seconds[1:]


def now(world: World) -> float:
    """Seconds, once the device has done what it was asked to."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def bare_deepspeed(job: TrainJob, world: World, batch: Batch, draws: Any) -> Callable[[], None]:
    """One step of DeepSpeed with the trainer's configuration, and nothing else."""
    model = build_dit(job.model, job.config.seed).to(world.device)
    model.activation_checkpointing = job.config.activation_checkpointing
    model.compile_blocks = job.config.compile_blocks
    engine = build_engine(model, job.config, world)
    objective = make_flow_matching(job, world.device)

    def step() -> None:
        loss, _ = objective(engine, batch, draws)
        engine.backward(loss)
        engine.step()

    return step


def plain_pytorch(job: TrainJob, world: World, batch: Batch, draws: Any) -> Callable[[], None]:
    """One step of DistributedDataParallel and AdamW, all in the precision of the model."""
    config = job.config
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    model = build_dit(job.model, config.seed).to(world.device, dtype)
    model.activation_checkpointing = config.activation_checkpointing
    model.compile_blocks = config.compile_blocks
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    objective = make_flow_matching(job, world.device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        config.optimizer.learning_rate,
        config.optimizer.betas,
        weight_decay=0.0,
        fused=fused_by_default(config, world.device) or None,
    )

    def step() -> None:
        optimizer.zero_grad()
        loss, _ = objective(parallel, batch, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        optimizer.step()

    return step


def first_batch(run: Run) -> tuple[Batch, Any]:
    """The batch that the bare loops repeat, with its draws, on the device."""
    (batch, *more) = next(run.loader.steps(0, 1))
    assert not more, "one micro-batch per step, please: leave micro_batch alone"
    draws = stack_draws(
        [
            run.objective.draw(batch.latents.shape[1:], sample_generator(0, 0, index, "draws"), 0.0)
            for index in batch.sample_indices
        ]
    )
    device = run.world.device
    return batch.to(device), {name: value.to(device) for name, value in draws.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    world = join_world()
    steps = f"steps={TURN * (options.turns + WARM_UP) + 1}"
    job = make_job(world, options.preset, [*SMALL, steps, *options.overrides])
    run = make_run(InterleavedRun, job, world)
    batch, draws = first_batch(run)
    peers = {"DeepSpeed": bare_deepspeed, "PyTorch": plain_pytorch}
    run.prepare({name: make(job, world, batch, draws) for name, make in peers.items()})
    with StopRequest(world) as stop:
        run.train(stop)
    run.records.close("FINISHED")
    if world.is_main:
        report(run, world)


def report(run: InterleavedRun, world: World) -> None:
    """Print medians and ratios."""
    turns = {name: found[WARM_UP:] for name, found in run.turns.items()}
    config = run.config
    print(
        f"{world.size} worker(s), {world.device.type}, {config.precision}, "
        f"ZeRO {config.zero_stage}, {config.global_batch} clips per step; "
        f"{len(turns['trainer'])} turns of {TURN - 1} steps"
    )
    print("| loop | step, median | turn / that of bare DeepSpeed, median | all / all of it |")
    print("|---|---|---|---|")
    for name, found in turns.items():
        pairs = [(sum(a), sum(b)) for a, b in zip(found, turns["DeepSpeed"], strict=True)]
        ratio = statistics.median(a / b for a, b in pairs)
        total = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
        median = 1e3 * statistics.median([second for turn in found for second in turn])
        print(f"| {name} | {median:.1f} ms | {ratio:.3f} | {total:.3f} |")


if __name__ == "__main__":
    main()
