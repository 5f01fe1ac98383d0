"""Low-rank adapters (LoRA): fine-tuning that trains, saves and averages a fraction of the weights.

peft puts the adapters in and merges them; the trainer does not know that they are there, only that
the weights under them are frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamdit.errors import UserError
from streamdit.io import load_model
from streamdit.model import StreamDiT
from training.config import AdapterConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Adapters that peft saves are named so: behind its own wrapper, without the adapter's name.
PREFIX = "base_model.model."
NAME = ".default"


def add_adapters(model: StreamDiT, config: AdapterConfig) -> StreamDiT:
    """Freeze `model` and put trainable adapters beside its linear layers, in place.

    The output stays what it was until the first update: an adapter's second matrix starts at 0.

    Raises:
        UserError: if a target names no linear layer of the model.
    """
    from peft import inject_adapter_in_model

    for target in config.targets:
        found = [
            module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")
        ]
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            raise UserError(
                f"lora.targets: {target} names no linear layer of the model; choose from "
                f"{', '.join(AdapterConfig().targets)}"
            )
    inject_adapter_in_model(_peft_config(config), model)
    return model


def merged_weights(
    parent: Path, config: AdapterConfig, adapters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of the parent model with adapters added in, under the parent's own names, float32.

    Args:
        parent: model directory.
        config: what the adapters were made with.
        adapters: their weights by parameter name.
    """
    model = add_adapters(load_model(parent, dtype=torch.float32)[0], config)
    model.load_state_dict(adapters, strict=False)
    _merge(model)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def save_adapter(
    directory: Path, config: AdapterConfig, adapters: dict[str, Tensor], parent_sha256: str
) -> None:
    """Write adapters as peft does: `adapter_config.json` and safetensors, a few MB."""
    directory.mkdir(parents=True, exist_ok=True)
    _peft_config(config).save_pretrained(directory)
    named = {PREFIX + name.replace(NAME, ""): tensor for name, tensor in adapters.items()}
    save_file(named, directory / ADAPTER_WEIGHTS, {"format": "pt", "parent": parent_sha256})


def load_adapter(directory: Path) -> dict[str, Tensor]:
    """Adapters that :func:`save_adapter` wrote, by parameter name."""
    return {
        name.removeprefix(PREFIX).replace(".weight", f"{NAME}.weight"): tensor
        for name, tensor in load_file(directory / ADAPTER_WEIGHTS).items()
    }


def _merge(model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()


def _peft_config(config: AdapterConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        target_modules=list(config.targets),
    )
