"""From a plain module to a DeepSpeed engine, on whatever process group there is."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.config import RunConfig


@dataclass(frozen=True)
class World:
    """This process among the workers of a run."""

    rank: int
    size: int
    device: torch.device
    made_group: bool = False

    def leave(self) -> None:
        """Close the process group if :func:`join_world` made it."""
        if self.made_group and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes for all."""
        return self.rank == 0


def join_world(timeout_s: float = 1800.0) -> World:
    """Adopt the process group that the launcher made, or make one.

    Ray Train has made it already; torchrun and Slurm give RANK, WORLD_SIZE and an address; a
    plain process becomes a world of one.
    """
    cuda = torch.cuda.is_available()
    make_group = not dist.is_initialized()
    if make_group:
        if "RANK" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ.update(
                RANK="0",
                LOCAL_RANK="0",
                WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device, make_group)


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a training configuration."""
    micro_batch, accumulation = config.accumulation(world_size)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.global_batch,
        "gradient_clipping": config.optimizer.gradient_clip,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }


def build_engine(module: nn.Module, config: RunConfig, world: World) -> Any:
    """Wrap `module` into a DeepSpeed engine with AdamW."""
    if world.device.type == "cpu":
        # DeepSpeed picks its accelerator when it is imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_config(config, world.size),
        dist_init_required=False,
    )
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
