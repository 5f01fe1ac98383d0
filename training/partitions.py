"""Where DeepSpeed keeps the float32 weights: which stretch of which parameter is on this rank.

ZeRO lays the trainable parameters of a group out as one flat float32 tensor per rank. Everything
that is kept per weight beside it (Adam's moments, the average) has the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A stretch of a flattened parameter that one rank holds.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        start: first element of the stretch within the flattened parameter.
        numel: its elements.
        group: index of the flat tensor that holds it.
        offset: its place in that flat tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    group: int
    offset: int


def master_partitions(engine: Any) -> list[Tensor]:
    """This rank's float32 master weights, one flat tensor per group (ZeRO 1, 2 and 3)."""
    return [parameter.data for parameter in _flat_parameters(engine)]


def _flat_parameters(engine: Any) -> list[Tensor]:
    """The flat tensors themselves, which key the state of the wrapped optimizer."""
    optimizer = engine.optimizer
    for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        partitions = getattr(optimizer, attribute, None)
        if partitions:
            return list(partitions)
    raise AssertionError(f"{type(optimizer).__name__} keeps no float32 partitions")


def fragments(engine: Any) -> list[Fragment]:
    """What this rank holds of every trainable parameter."""
    held = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            optimizer = engine.optimizer
            place = optimizer.grad_position[optimizer.get_param_id(parameter)]
            group, offset, share = (int(value) for value in place)
            # Every rank has a share of the same size; the last ones may be padding.
            start = share * engine.global_rank
            numel = max(0, min(share, parameter.ds_numel - start))
            held.append(Fragment(name, tuple(parameter.ds_shape), start, numel, group, offset))
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            group = int(mapping.param_group_index)
            held.append(
                Fragment(
                    name, tuple(parameter.shape), inside.start, inside.numel, group, place.start
                )
            )
    return [fragment for fragment in held if fragment.numel]


def adam_state(engine: Any, step: int) -> list[dict[str, Tensor]]:
    """Fresh moments for every flat tensor, as after `step` updates; to be filled by the caller."""
    states = []
    for parameter in _flat_parameters(engine):
        state = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.zeros_like(parameter.data),
            "exp_avg_sq": torch.zeros_like(parameter.data),
        }
        engine.optimizer.optimizer.state[parameter] = state
        states.append(state)
    return states


@torch.no_grad()
def publish_masters(engine: Any) -> None:
    """Make the weights that the model computes with those of the float32 masters, on all ranks."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Small parameters are kept whole on every rank.
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
