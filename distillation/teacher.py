"""The teacher in memory: whole on every worker, or sharded over them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distillation.config import DistillConfig
from streamdit.flow import VelocityFunction
from streamdit.io import load_model
from streamdit.model import StreamDiT
from training.engine import initialize_deepspeed


def load_teacher(directory: str, config: DistillConfig, device: torch.device) -> VelocityFunction:
    """The frozen teacher, in the run's precision."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    if config.teacher.placement == "sharded":
        model, _ = load_model(directory, dtype=dtype)
        return shard(freeze(model), config, device)
    model, _ = load_model(directory, device, dtype)
    model.compile_blocks = config.compile_blocks
    return freeze(model)


def freeze(model: StreamDiT) -> StreamDiT:
    """Evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)


def shard(model: StreamDiT, config: DistillConfig, device: torch.device) -> Any:
    """Split the weights over the process group (ZeRO-3); a forward pass gathers layer by layer.

    Every worker then has to evaluate the teacher equally often.
    """
    world = dist.get_world_size()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world,
        "bf16": {"enabled": config.precision == "bfloat16"},
        # Norms and biases stay whole: gathering them costs more than they weigh.
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 4 * model.config.width,
        },
    }
    engine = initialize_deepspeed(device, model.to(device), settings)
    engine.eval()
    return engine
