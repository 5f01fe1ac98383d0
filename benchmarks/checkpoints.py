"""What a checkpoint costs: seconds to save and to restore, bytes per parameter.

    python benchmarks/checkpoints.py [--preset small] [--rounds 5] [KEY=VALUE ...]
    torchrun --nproc-per-node 2 benchmarks/checkpoints.py zero_stage=3

Beside it stands `torch.save` and `torch.load` of the model and AdamW's state in one process, the
least that a resumable training writes: 12 bytes per parameter in float32. Ours adds the averaged
weights (4 bytes), a hash of every file, and DeepSpeed's own copy of the weights. They take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from made_up_run import make_job, make_run

from streamdit.model import build_dit
from training.checkpoint import checkpoint_folder, load_checkpoint
from training.engine import World, join_world
from training.run import Run
from training.stop import StopRequest


def timed(world: World, action: Callable[[], object]) -> float:
    """Seconds until all workers have done `action`."""
    world.barrier()
    started = time.perf_counter()
    action()
    world.barrier()
    return time.perf_counter() - started


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    world = join_world()
    small = ("steps=1", "global_batch=2", "micro_batch=null")
    job = make_job(world, options.preset, [*small, *options.overrides])
    run = make_run(Run, job, world)
    with StopRequest(world) as stop:
        run.train(stop)
    run.records.close("FINISHED")

    plain = build_dit(job.model)
    optimizer = torch.optim.AdamW(plain.parameters())
    for parameter in plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    file = Path(job.out) / "plain.pt"

    def save_plain() -> None:
        if world.is_main:
            torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict()}, file)

    def load_plain() -> None:
        if world.is_main:
            state = torch.load(file, weights_only=True)
            plain.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

    def load() -> None:
        load_checkpoint(run.checkpoints, run.engine, run.ema, world, job.config.zero_stage, run.job)

    actions = {
        ("trainer", "save"): run._save,
        ("torch.save", "save"): save_plain,
        ("trainer", "restore"): load,
        ("torch.save", "restore"): load_plain,
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
    for _ in range(options.rounds + 1):
        for key, action in actions.items():
            seconds[key].append(timed(world, action))
    if not world.is_main:
        return
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    sizes = {"trainer": size_of(checkpoint_folder(run.checkpoints, 1)), "torch.save": size_of(file)}
    config = job.config
    print(
        f"{parameters / 1e6:.1f}M parameters, {world.size} worker(s), {world.device.type}, "
        f"{config.precision}, ZeRO {config.zero_stage}; medians of {options.rounds}"
    )
    print("| | save | restore | bytes per parameter |\n|---|---|---|---|")
    for name in sizes:
        save, restore = (statistics.median(seconds[name, what][1:]) for what in ("save", "restore"))
        print(f"| {name} | {save:.3f} s | {restore:.3f} s | {sizes[name] / parameters:.1f} |")
    for what in ("save", "restore"):
        pairs = zip(seconds["trainer", what][1:], seconds["torch.save", what][1:], strict=True)
        print(f"{what}: trainer / torch.save {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
