"""Weights of Wan's text-to-video transformer (diffusers' `WanTransformer3DModel`) as ours.

Wan and StreamDiT are the same kind of network. What differs is chosen by the configuration that
:func:`dit_config` returns: adaLN-single, q/k norms across heads, text filled up with zeros and
attended to without a mask, and a time embedding of the noise level. What is only a matter of
layout is settled here, in the weights:

* Wan noises as `x = (1 - sigma) data + sigma noise` and predicts `noise - data` at time
  `1000 sigma`. Ours is tau = 1 - sigma and predicts `data - noise`, so the output projection
  changes its sign.
* Wan's output gives the voxels of a patch as (row, column, channel), ours as (channel, row,
  column), as both take them in.
* q, k and v (and k and v of the text) are one matrix here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from streamdit.config import BucketConfig, DiTConfig
from streamdit.errors import UserError

TRANSFORMER_CLASS = "WanTransformer3DModel"
TEXT_TOKENS = 512
"""Length that Wan fills every prompt up to."""

EPSILON = 1e-6
"""Of every norm here; all published Wan models have the same."""


class WanConfig(BaseModel):
    """`config.json` of the transformer, as far as it matters; defaults are diffusers'."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    class_name: str = Field(default="", alias="_class_name")
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = EPSILON
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None

    @property
    def width(self) -> int:
        """Token width."""
        return self.num_attention_heads * self.attention_head_dim


def read_wan_config(values: Mapping[str, Any], source: str) -> WanConfig:
    """Parse and check a transformer's `config.json`.

    Raises:
        UserError: if it is no Wan text-to-video transformer, or one with parts that are not here.
    """
    try:
        config = WanConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{source}: {key} of the transformer's config.json: {first['msg']}; download it again"
        ) from None
    if config.class_name != TRANSFORMER_CLASS:
        raise UserError(
            f"{source}: its transformer is a {config.class_name or 'nameless class'}, but only "
            f"diffusers' {TRANSFORMER_CLASS} can be converted; give a Wan text-to-video model"
        )
    out_channels = config.out_channels or config.in_channels
    if config.image_dim or config.added_kv_proj_dim or config.in_channels != out_channels:
        raise UserError(
            f"{source} is conditioned on images ({config.in_channels} channels in, {out_channels} "
            "out), which this model has no input for; give a text-to-video model, such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    for name, found, known in (
        ("patch_size", config.patch_size[0], 1),
        ("cross_attn_norm", config.cross_attn_norm, True),
        ("qk_norm", config.qk_norm, "rms_norm_across_heads"),
        ("eps", config.eps, EPSILON),
    ):
        if found != known:
            raise UserError(
                f"{source}: {name} {found} of its transformer is not supported, only {known}, "
                "which all published Wan text-to-video models have; give one of these"
            )
    return config


def dit_config(wan: WanConfig, bucket: BucketConfig, text_encoder: str) -> DiTConfig:
    """Our configuration of the same network.

    Args:
        wan: configuration of the transformer.
        bucket: latent grid and window; a window as large as the grid is Wan's full attention.
        text_encoder: name of the text encoder.
    """
    return DiTConfig(
        latent_channels=wan.in_channels,
        buckets=(bucket,),
        patch=wan.patch_size,
        width=wan.width,
        depth=wan.num_layers,
        heads=wan.num_attention_heads,
        ffn_width=wan.ffn_dim,
        modulation="single",
        time_axis="noise",
        time_frequencies=wan.freq_dim,
        text={text_encoder: wan.text_dim},
        text_norm=False,
        text_padding=TEXT_TOKENS,
        qk_norm="across_heads",
    )


@dataclass(frozen=True)
class Recipe:
    """How one tensor of ours is made: from which of theirs, and by which function."""

    sources: tuple[str, ...]
    combine: Callable[[Sequence[Tensor]], Tensor]


def recipes(wan: WanConfig, text_encoder: str) -> dict[str, Recipe]:
    """Recipe of every tensor of our state dict."""
    found = {
        "patch_embedding.weight": Recipe(
            ("patch_embedding.weight",), lambda parts: parts[0].flatten(1)
        ),
        "patch_embedding.bias": _same("patch_embedding.bias"),
        "output.modulation.table": Recipe(("scale_shift_table",), lambda parts: parts[0][0]),
    }
    projector = f"text.projectors.{text_encoder}"
    for ours, theirs in (
        ("time_embedding.input", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.output", "condition_embedder.time_embedder.linear_2"),
        ("shared_modulation", "condition_embedder.time_proj"),
        (f"{projector}.1", "condition_embedder.text_embedder.linear_1"),
        (f"{projector}.3", "condition_embedder.text_embedder.linear_2"),
    ):
        found |= _linear(ours, theirs)
    for index in range(wan.num_layers):
        found |= _block(f"blocks.{index}")
    for kind in ("weight", "bias"):
        found[f"output.projection.{kind}"] = Recipe((f"proj_out.{kind}",), _Output(wan))
    return found


@dataclass(frozen=True)
class _Output:
    """Rows (row, column, channel) to (channel, row, column), and the other sign."""

    wan: WanConfig

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        _, rows, columns = self.wan.patch_size
        voxels = parts[0].unflatten(0, (rows, columns, -1))
        return -voxels.movedim(2, 0).flatten(0, 2)


def _block(name: str) -> dict[str, Recipe]:
    """Recipes of one block, which has the same name on both sides."""
    table = Recipe((f"{name}.scale_shift_table",), lambda parts: parts[0][0])
    found = {f"{name}.modulation.table": table}
    for ours, theirs in (
        ("attention.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("attention.output", ("attn1.to_out.0",)),
        ("text_norm", ("norm2",)),
        ("text_attention.to_query", ("attn2.to_q",)),
        ("text_attention.to_key_value", ("attn2.to_k", "attn2.to_v")),
        ("text_attention.output", ("attn2.to_out.0",)),
        ("ffn.0", ("ffn.net.0.proj",)),
        ("ffn.2", ("ffn.net.2",)),
    ):
        found |= _linear(f"{name}.{ours}", *(f"{name}.{part}" for part in theirs))
    for layer, attn in (("attention", "attn1"), ("text_attention", "attn2")):
        for role, norm in (("query", "norm_q"), ("key", "norm_k")):
            found[f"{name}.{layer}.{role}.joint_norm.weight"] = _same(
                f"{name}.{attn}.{norm}.weight"
            )
    return found


def _linear(ours: str, *theirs: str) -> dict[str, Recipe]:
    """Weight and bias of a layer that holds the rows of one or several of theirs."""
    return {
        f"{ours}.{kind}": Recipe(tuple(f"{part}.{kind}" for part in theirs), _stack)
        for kind in ("weight", "bias")
    }


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _same(theirs: str) -> Recipe:
    return Recipe((theirs,), lambda parts: parts[0])
