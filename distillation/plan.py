"""What is walked in distillation: buffers and the noise segment that each frame crosses.

Positions count the T = s N steps of the teacher: a frame in segment i begins at (i - 1) s and ends
at i s, in s micro steps of the teacher or one step of the student (arXiv:2507.03745v4, Sec. 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from distillation.config import DriftConfig, TeacherConfig, share_at
from streamdit.config import GammaConfig, StreamDiTConfig
from streamdit.errors import UserError
from streamdit.partition import PartitionScheme, step_levels
from training.objective import Draws

STAIRCASE, UNIFORM, RAMP, CONTINUED = 0, 1, 2, 3
KINDS = ("staircase", "uniform", "ramp", "continued")
"""Kinds of buffer: a stream under way, its first video, the way up a ramp, and the first video
behind given references."""

FROM_CLIP, FROM_TEACHER, FROM_STUDENT = 0, 1, 2


@dataclass(frozen=True)
class RolloutPlan:
    """What the teacher is asked for.

    Attributes:
        scheme: K, N, c and the teacher's s.
        gamma: noise schedule, the teacher's own.
        sigma_min: noise left at tau = 1, the teacher's own.
        guidance: weight w per noise segment, N numbers.
        uniform_share: share of buffers whose frames all cross one segment.
        ramp_share: share of buffers on the way up a ramp.
        continued_share: share of buffers whose frames all cross one segment behind K clean ones.
        drift: share of staircase buffers from streams.
    """

    scheme: PartitionScheme
    gamma: GammaConfig
    sigma_min: float
    guidance: tuple[float, ...]
    uniform_share: float
    ramp_share: float = 0.0
    continued_share: float = 0.0
    drift: DriftConfig = field(default_factory=DriftConfig)

    @classmethod
    def make(
        cls, settings: TeacherConfig, parent: StreamDiTConfig, drift: DriftConfig | None = None
    ) -> RolloutPlan:
        """Plan for a teacher with the configuration `parent`.

        Raises:
            UserError: if chunks do not fit the buffer, or weights the segments.
        """
        scheme = PartitionScheme.for_buffer(
            parent.model.buffer_frames,
            settings.chunk_frames,
            settings.micro_steps,
            settings.reference_frames,
        )
        return cls(
            scheme,
            parent.partition.gamma,
            parent.partition.sigma_min,
            per_segment(settings.guidance_scale, scheme, "teacher.guidance_scale"),
            settings.uniform_share,
            settings.ramp_share,
            settings.continued_share,
            drift or DriftConfig(),
        )

    @property
    def buffer_kinds(self) -> tuple[str, ...]:
        """Kinds of buffer that are drawn."""
        shares = (1.0, self.uniform_share, self.ramp_share, self.continued_share)
        return tuple(name for name, share in zip(KINDS, shares, strict=True) if share > 0)

    def draw(
        self, latent_shape: torch.Size, generator: torch.Generator, progress: float = 0.0
    ) -> Draws:
        """Everything random of one sample with latents of `latent_shape` `[f, C, h, w]`.

        Args:
            latent_shape: of the clip's latents.
            generator: the sample's own.
            progress: share of the run's steps that are done; decides the shares of drift.

        Returns:
            `positions [f]` and `moving [f]` of the buffer, its `kind`, `noise` of the buffer and
            of all chunks that may enter, `origin` and `moved_chunks` of a stream's buffer, and
            whether a stream is asked at all at this progress (`ask_teacher`, `ask_student`).
        """
        entering = self.drift.chunks * self.scheme.c
        frames = latent_shape[0] + (entering if self._drifts else 0)
        noise = torch.randn(frames, *latent_shape[1:], generator=generator)
        kind_at, origin_at = torch.rand(2, generator=generator).tolist()
        segment = int(torch.randint(0, self.scheme.N, (), generator=generator))
        moved = torch.randint(1, self.drift.chunks + 1, (), generator=generator)
        kind = self._kind(kind_at)
        positions, moving = self._buffer(kind, segment)
        teacher = share_at(self.drift.teacher, progress)
        student = share_at(self.drift.student, progress)
        origin = FROM_CLIP
        if kind == STAIRCASE and origin_at < teacher + student:
            origin = FROM_TEACHER if origin_at < teacher else FROM_STUDENT
        return {
            "noise": noise,
            "kind": torch.tensor(kind),
            "positions": positions,
            "moving": moving,
            "origin": torch.tensor(origin),
            "moved_chunks": moved,
            "ask_teacher": torch.tensor(teacher > 0),
            "ask_student": torch.tensor(student > 0),
        }

    @property
    def _drifts(self) -> bool:
        return self.drift.needs_teacher or self.drift.needs_student

    def _kind(self, at: float) -> int:
        end = 0.0
        for kind, share in (
            (UNIFORM, self.uniform_share),
            (RAMP, self.ramp_share),
            (CONTINUED, self.continued_share),
        ):
            end += share
            if at < end:
                return kind
        return STAIRCASE

    def _buffer(self, kind: int, segment: int) -> tuple[Tensor, Tensor]:
        """Positions and moving frames of a buffer; `segment` 0 ... N - 1 is the drawn one."""
        scheme = self.scheme
        positions, moving = scheme.positions(), scheme.segments() > 0
        if kind == UNIFORM:
            # The first video has no references yet: the frames that become them walk along.
            positions = torch.full_like(positions, segment * scheme.s)
            moving = torch.ones_like(moving)
        elif kind == CONTINUED:
            positions = torch.where(moving, segment * scheme.s, positions)
        elif kind == RAMP:
            waiting = positions - segment * scheme.s
            positions = torch.where(moving, waiting.clamp(min=0), positions)
            moving = moving & (waiting >= 0)
        return positions, moving

    def levels(self, positions: Tensor, moving: Tensor, micro_step: int) -> Tensor:
        """Times `[b, f]` at a micro step 0 ... s of frames that begin at `positions`."""
        taken = positions + micro_step * moving
        return step_levels(taken, self.scheme.total_steps, self.gamma)

    def at_segment(self, values: Sequence[float], positions: Tensor) -> Tensor:
        """Per frame `[b, f]`, the entry of N `values` for the segment it crosses (last for K)."""
        index = torch.div(positions, self.scheme.s, rounding_mode="floor")
        return _table((*values, values[-1]), positions.device)[index]


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` on a device, copied there once: the copy makes the host wait."""
    return torch.tensor(values, device=device)


def per_segment(
    value: float | Sequence[float], scheme: PartitionScheme, name: str
) -> tuple[float, ...]:
    """N numbers from one number, or from N.

    Raises:
        UserError: if there is another number of them.
    """
    values = tuple(value) if isinstance(value, Sequence) else (float(value),) * scheme.N
    if len(values) != scheme.N:
        raise UserError(
            f"{name} has {len(values)} numbers but chunk_frames {scheme.c} makes N = {scheme.N} "
            "noise segments; give one number, or one for each segment"
        )
    return values
