"""Multistep distillation (arXiv:2507.03745v4, Sec. 3.4).

The teacher moves a whole buffer through s guided micro steps, which carries every chunk across its
own noise segment. The student learns the average velocity of that walk, so that one step without
guidance does the same: step and guidance distillation at once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from distillation.plan import KINDS, RolloutPlan, per_segment
from distillation.rollout import LiveRollouts, Rollout, RolloutSource
from streamdit.flow import VelocityFunction, flow_matching_loss
from streamdit.io import read_model_config
from training.data import Batch
from training.objective import Draw, Draws, Figures, Mean, Metrics

if TYPE_CHECKING:
    from training.job import TrainJob


class MultistepDistillation:
    """Student loss: `sum_i lambda_i |v(X0, a, P)_i - u_i|^2` over the frames that move.

    Args:
        source: where the targets u come from.
        plan: noise levels of the buffers.
        segment_weights: lambda, N numbers; scaled to a mean of 1.
    """

    def __init__(
        self,
        source: RolloutSource,
        plan: RolloutPlan,
        segment_weights: tuple[float, ...] | None = None,
    ) -> None:
        self.source = source
        self.plan = plan
        weights = segment_weights or (1.0,) * plan.scheme.N
        mean = sum(weights) / len(weights)
        self.segment_weights = tuple(weight / mean for weight in weights)

    @property
    def draw(self) -> Draw:
        """Makes everything random of one sample, as the source wants it."""
        return self.source.draw

    def extra_forwards(self, draws: Draws) -> int:
        """What the source spends on a batch of these draws."""
        return self.source.extra_forwards(draws)

    def __call__(
        self, student: VelocityFunction, batch: Batch, draws: Draws
    ) -> tuple[Tensor, Figures]:
        """Loss over the frames that move; figures give it per kind of buffer and per segment."""
        rollout = self.source(student, batch, draws)
        moving = rollout.moving.float()
        weight = moving * self.plan.at_segment(self.segment_weights, rollout.positions)
        weight = weight / moving.mean(dim=1, keepdim=True)
        tau = self.plan.levels(rollout.positions, rollout.moving, 0)
        # Nothing flows into the walk, nor into a stream of the student that led to its start.
        prediction = student(rollout.start.detach(), tau, batch.text)
        per_frame = flow_matching_loss(prediction, rollout.target.detach(), weight)
        figures = partial(self._figures, per_frame.detach(), weight, rollout)
        return per_frame.mean(dim=1).mean(), figures

    def _figures(self, per_frame: Tensor, weight: Tensor, rollout: Rollout) -> Metrics:
        """Figures of a batch with these weighted losses `[b, f]`."""
        per_sample, kind = per_frame.mean(dim=1), rollout.kind
        by_kind: Metrics = {
            f"loss_{name}": Mean((per_sample * (kind == index)).sum(), (kind == index).sum())
            for index, name in enumerate(KINDS)
        }
        return by_kind | self._by_segment(per_frame, weight, rollout)

    def _by_segment(self, per_frame: Tensor, weight: Tensor, rollout: Rollout) -> Metrics:
        """Loss of the moving frames in each noise segment, 1 the noisiest, without its weight."""
        segments = self.plan.scheme.N
        index = torch.div(rollout.positions, self.plan.scheme.s, rounding_mode="floor")
        counted = weight > 0
        member = one_hot(index.clamp(max=segments - 1), segments) * counted[..., None]
        losses = per_frame / torch.where(counted, weight, 1.0)
        totals = (losses[..., None] * member).sum(dim=(0, 1))
        counts = member.sum(dim=(0, 1))
        return {
            f"loss_segment_{number + 1}": Mean(totals[number], counts[number])
            for number in range(segments)
        }


def make_objective(job: TrainJob, device: torch.device) -> MultistepDistillation:
    """Objective of a distillation job; its parent is the teacher.

    Raises:
        UserError: if the configuration does not fit the teacher, or cached rollouts do not fit.
    """
    from distillation.cache import CachedRollouts
    from distillation.config import DistillConfig
    from distillation.teacher import load_teacher

    config = job.config
    assert isinstance(config, DistillConfig)
    assert job.parent is not None
    parent = read_model_config(job.parent)
    plan = RolloutPlan.make(config.teacher, parent, config.drift)
    source: RolloutSource
    if config.rollouts:
        cached = CachedRollouts(config.rollouts)
        cached.check_fits(plan, parent, job.dataset, config.precision)
        source = cached
    else:
        source = LiveRollouts(load_teacher(job.parent, config, device), plan)
    weights = config.segment_weights
    if weights is not None:
        weights = per_segment(weights, plan.scheme, "segment_weights")
    return MultistepDistillation(source, plan, weights)
