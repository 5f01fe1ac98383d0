"""Buffers out of a model's own stream, for a student that must live on what it makes itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distillation.plan import FROM_TEACHER, RolloutPlan
from streamdit.denoiser import advance_buffer
from streamdit.text.base import TextStates
from training.objective import Draws

WalkSegments = Callable[[Tensor, Tensor, TextStates], Tensor]
"""`(latents [b, f, C, h, w], positions [b, f], text) -> latents` one segment further on."""


def stream_buffers(
    start: Tensor,
    walk: WalkSegments,
    plan: RolloutPlan,
    text: TextStates,
    draws: Draws,
    origin: int,
) -> Tensor:
    """Let a stream move those buffers of `start` that shall be its own, by their drawn chunks.

    Every worker evaluates the model equally often, whatever was drawn for its samples: sharded
    weights are gathered by all workers together.

    Args:
        start: `[b, f, C, h, w]`, staircase buffers of noised clips among others.
        walk: carries a buffer across its segments.
        plan: scheme and drift.
        text: states of the b prompts.
        draws: of the batch.
        origin: which rows are meant.

    Returns:
        `start` with these rows replaced.
    """
    scheme = plan.scheme
    rows, chosen = _rows(plan, draws, origin)
    if not rows:
        return start
    buffer, noise = start[rows], draws["noise"][rows, start.shape[1] :]
    positions = scheme.positions().to(start.device).expand(len(rows), -1)
    prompts, moves = text.select(rows), draws["moved_chunks"][rows]
    for chunk in range(plan.drift.chunks):
        entering = noise[:, chunk * scheme.c : (chunk + 1) * scheme.c]
        _, moved = advance_buffer(walk(buffer, positions, prompts), entering, scheme)
        buffer = torch.where((chunk < moves)[:, None, None, None, None], moved, buffer)
    if not chosen:
        return start
    result = start.clone()
    result[rows] = buffer
    return result


def moved_samples(plan: RolloutPlan, draws: Draws, origin: int) -> int:
    """Walks of one sample over its segments that :func:`stream_buffers` takes for these draws."""
    rows, _ = _rows(plan, draws, origin)
    return plan.drift.chunks * len(rows)


def _rows(plan: RolloutPlan, draws: Draws, origin: int) -> tuple[list[int], bool]:
    """Rows that a stream moves, and whether they are meant.

    One that is not is moved where none is, if such a stream is asked at all at this progress.
    """
    drift, teacher = plan.drift, origin == FROM_TEACHER
    # Draws lie on the device: a plan that never asks must not wait for it.
    if not (drift.needs_teacher if teacher else drift.needs_student):
        return [], False
    if not bool(draws["ask_teacher" if teacher else "ask_student"][0]):
        return [], False
    chosen = (draws["origin"] == origin).nonzero().flatten().tolist()
    return chosen or [0], bool(chosen)
