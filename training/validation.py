"""Loss on held-out clips, always with the same draws, so that two validations compare."""

from __future__ import annotations

import itertools

import torch

from streamdit.flow import VelocityFunction
from training.data import LatentDataset
from training.engine import World
from training.loader import BatchLoader
from training.means import Means
from training.objective import Objective, stack_draws
from training.order import sample_generator
from training.stop import StopRequest

VALIDATION_SEED = 1_000_003


def first_of_each_bucket(dataset: LatentDataset, count: int) -> list[int]:
    """The first `count` clips, taken from the buckets in turn; the same at every call."""
    buckets = [dataset.buckets[name] for name in sorted(dataset.buckets)]
    turns = itertools.zip_longest(*buckets)
    return [int(clip) for turn in turns for clip in turn if clip is not None][:count]


@torch.no_grad()
def validate(
    student: VelocityFunction,
    objective: Objective,
    dataset: LatentDataset,
    loader: BatchLoader,
    samples: int,
    world: World,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Mean loss and figures over the first `samples` held-out clips; every rank takes part.

    Args:
        student: the model under training.
        objective: what it is trained towards.
        dataset: held-out clips.
        loader: gives the micro-batch size.
        samples: clips of all ranks together.
        world: this process.
        stop: looked at before each clip.

    Returns:
        The figures; None if a request to stop broke it off.
    """
    clips = first_of_each_bucket(dataset, samples)
    figures = Means()
    # Every rank makes the same number of forward passes, which ZeRO-3 needs; a rank that has run
    # out of clips repeats one without counting it.
    for start in range(0, len(clips), world.size):
        if stop.asked():
            return None
        index = min(start + world.rank, len(clips) - 1)
        batch = loader.collate(clips, [index], step=VALIDATION_SEED).to(world.device)
        generator = sample_generator(VALIDATION_SEED, 0, index, "draws")
        draws = stack_draws([objective.draw(batch.latents.shape[1:], generator)])
        draws = {name: value.to(world.device) for name, value in draws.items()}
        loss, more = objective(student, batch, draws)
        if start + world.rank < len(clips):
            figures.add({"loss": loss, **more()})
    return figures.reduce(world)
