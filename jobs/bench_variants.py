"""The optimisations that `streamdit bench` adds in turn, as far as a device has them."""

from __future__ import annotations

import torch
from torch import nn

from streamdit.autoencoder.base import Autoencoder
from streamdit.decoding import DecoderConfig, converted
from streamdit.model import StreamDiT
from streamdit.model.fast import FLOAT8_CAPABILITY, FastConfig
from streamdit.model.quantise import with_float8_linears

PLAIN = "plain"
FLOAT8 = "+ float8"

Capability = tuple[int, int] | None
"""Compute capability of a CUDA device; None for what is none."""


def capability_of(device: torch.device) -> Capability:
    """What the variants for `device` depend on."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def step_variants(
    compiled: bool, capability: Capability, dtype: torch.dtype, autotune: bool = False
) -> dict[str, FastConfig | None]:
    """Optimisations of a step of a model in `dtype`, each on top of those before.

    `autotune` adds that of compiled steps, which takes long for a large model.
    """
    variants: dict[str, FastConfig | None] = {
        PLAIN: None,
        "+ modulation table": FastConfig(text_memory=False),
        "+ text memory": FastConfig(),
    }
    if compiled:
        variants["+ compiled blocks"] = FastConfig(compile=True)
        if autotune:
            variants["+ autotuning"] = FastConfig(compile=True, autotune=True)
    if capability is not None:
        graph = FastConfig(compile=compiled, autotune=compiled and autotune, cuda_graph=True)
        variants["+ CUDA graph"] = graph
        cudnn = graph.model_copy(update={"attention": "cudnn"})
        variants["+ cuDNN attention"] = cudnn
        if capability >= FLOAT8_CAPABILITY and dtype == torch.bfloat16:
            variants[FLOAT8] = cudnn.model_copy(update={"float8": True})
    return variants


def decoder_variants(compiled: bool, capability: Capability) -> dict[str, DecoderConfig]:
    """Optimisations of the decoder, each on top of those before."""
    last = DecoderConfig(bfloat16=True, channels_last=True)
    variants = {
        PLAIN: DecoderConfig(),
        "+ channels last": DecoderConfig(channels_last=True),
        "+ bfloat16": last,
    }
    if capability is not None:
        last = last.model_copy(update={"cudnn_autotune": True})
        variants["+ cuDNN autotuning"] = last
    if compiled:
        variants["+ compiled"] = last.model_copy(update={"compile": True})
    return variants


def networks_of(model: StreamDiT, fast: FastConfig | None) -> list[nn.Module]:
    """Whose weights a step holds: the network's, and those that a variant makes beside them."""
    rounded = fast is not None and fast.float8
    return [model, with_float8_linears(model)] if rounded else [model]


def decoders_of(autoencoder: Autoencoder, config: DecoderConfig) -> list[nn.Module]:
    """The same of a decoder."""
    return [autoencoder, converted(autoencoder, config.bfloat16, config.channels_last)]
