"""From a plain module to a DeepSpeed engine, on whatever process group there is."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
import warnings
import weakref
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import _lru_cache_wrapper, cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from streamdit.errors import UserError
from training.config import RunConfig
from training.network import use_route_to_master

T = TypeVar("T")
ZERO = "deepspeed.runtime.zero."


@dataclass(frozen=True)
class World:
    """This process among the workers of a run."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """Group of all workers for small messages between CPUs, whatever the gradients travel by."""

    def gather(self, value: T) -> list[T]:
        """The small picklable `value` of every rank, in their order; every rank calls this."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.control)

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes for all."""
        return self.rank == 0


def join_world(timeout_s: float = 1800.0) -> World:
    """Adopt the process group that the launcher made, or make one.

    Ray Train has made it already; torchrun and Slurm give RANK, WORLD_SIZE and an address; a
    plain process becomes a world of one.

    Raises:
        UserError: if the machine runs more workers than it has GPUs.
    """
    cuda = torch.cuda.is_available()
    index = _gpu_of_worker() if cuda else 0
    if not dist.is_initialized():
        backend, timeout = "nccl" if cuda else "gloo", timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            use_route_to_master()
            dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
            dist.init_process_group(
                backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
            )
        # Not before: DeepSpeed remembers the group for further runs of this process.
        atexit.register(dist.destroy_process_group)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device, _control_group(timeout_s))


def _gpu_of_worker() -> int:
    """Index of this worker's GPU among those that it sees."""
    worker, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if worker < there:
        return worker
    if there == 1 and (dist.is_initialized() or os.environ.get("SLURM_LOCALID") == str(worker)):
        return 0  # Ray and Slurm may show each worker its own GPU only
    raise UserError(
        f"worker {worker} of this machine finds no GPU of its own, for there are {there}: start at "
        f"most {there} workers here, or set CUDA_VISIBLE_DEVICES= to train on the CPUs"
    )


def wait_for_all() -> None:
    """Barrier for what one rank may do for hours while the others wait; every rank calls this."""
    dist.barrier(group=_patient_group())


@cache
def _patient_group() -> dist.ProcessGroup | None:
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))


@cache
def _control_group(timeout_s: float) -> dist.ProcessGroup | None:
    """One group for the small messages of all runs of this process."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a training configuration."""
    micro_batch, accumulation = config.accumulation(world_size)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.global_batch,
        "gradient_clipping": config.optimizer.gradient_clip,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }


def build_engine(module: nn.Module, config: RunConfig, world: World) -> Any:
    """Wrap `module` into a DeepSpeed engine with AdamW."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        fused=fused_by_default(config, world.device) or None,  # else as PyTorch chooses
    )
    return initialize_deepspeed(
        world.device, module, deepspeed_config(config, world.size), optimizer
    )


def fused_by_default(config: RunConfig, device: torch.device) -> bool:
    """Whether AdamW is one kernel: where it is asked for, or where it runs on a CUDA device."""
    if config.optimizer.fused is not None:
        return config.optimizer.fused
    return device.type == "cuda" and not config.offload_optimizer


def settle_optimizer(engine: Any, config: RunConfig, world: World) -> None:
    """Let the settings say how AdamW runs, whatever a checkpoint did.

    As one kernel it counts its steps on the device of what it steps.
    """
    fused = fused_by_default(config, world.device)
    adam = engine.optimizer.optimizer
    for group in adam.param_groups:
        group["fused"] = fused or None
    for parameter, state in adam.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device if fused else "cpu")


def initialize_deepspeed(
    device: torch.device,
    module: nn.Module,
    settings: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """DeepSpeed engine in this process group, without chatter in the run's log.

    DeepSpeed prints what it has compiled, and PyTorch warns of a CUDA toolkit without a GPU and
    of calls of DeepSpeed's that will have new names: matters of their developers.

    On CPUs DeepSpeed would compile an all-reduce through shared memory before the first step, for
    inference alone: training neither needs it nor a compiler.
    """
    if device.type == "cpu":
        # DeepSpeed picks its accelerator when it is imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    with redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        # What can be compiled is not even looked for, which takes a compiler and says so.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
    _engines.add(engine)
    return engine


_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def release_engines() -> None:
    """Give back the memory of all engines of this process, for what it does next.

    DeepSpeed's hooks would hold their weights otherwise, and for ZeRO-3 a list of modules and the
    caches of methods.
    """
    if not _engines:
        return
    while _engines:
        _engines.pop().destroy()
    stage3 = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if stage3 is not None:
        stage3.FWD_MODULE_STACK.clear()
        for found in gc.get_objects():
            # Not `isinstance`, which asks proxies of what is gone.
            if type(found) is _lru_cache_wrapper and str(found.__module__).startswith(ZERO):
                found.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
