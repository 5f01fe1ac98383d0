"""Partitioning of the stream buffer: which frame is how noisy (arXiv:2507.03745v4, Sec. 3.2).

The buffer is kept in playing order: its head (index 0) is the cleanest and leaves next, fresh
noise enters at the tail. The paper numbers noise segments i = 1 (noisiest) ... N (cleanest), so
the chunk at position j = 1 ... N from the head lies in segment i = N - j + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamdit.config import GammaConfig, PartitionConfig, SamplingConfig
from streamdit.errors import UserError


def apply_gamma(t: Tensor, gamma: GammaConfig) -> Tensor:
    """Noise schedule gamma(t), element-wise on values in [0, 1] (arXiv:2507.03745v4, Eq. 9)."""
    match gamma.kind:
        case "linear":
            return t
        case "exponential":
            return t**gamma.power
        case "shifted":
            return t / (gamma.shift - (gamma.shift - 1.0) * t)


@dataclass(frozen=True)
class PartitionScheme:
    """Partition of a buffer of B = K + N * c latent frames (arXiv:2507.03745v4, Eq. 7).

    Attributes:
        K: clean reference frames at the head (tau = 1; never updated, not in the loss).
        N: number of chunks.
        c: latent frames in a chunk; all frames of a chunk share one tau.
        s: micro denoising steps before the buffer moves by one chunk.
    """

    K: int
    N: int
    c: int
    s: int

    def __post_init__(self) -> None:
        if self.K < 0 or min(self.N, self.c, self.s) < 1:
            raise UserError(
                f"partition scheme K={self.K} N={self.N} c={self.c} s={self.s} is impossible; "
                "use K >= 0 and N, c, s >= 1"
            )

    @classmethod
    def for_buffer(
        cls,
        buffer_frames: int,
        chunk_frames: int,
        micro_steps: int = 1,
        reference_frames: int = 0,
    ) -> PartitionScheme:
        """Scheme that fills a buffer of B frames with chunks of c frames after K references.

        Raises:
            UserError: if c does not divide B - K.
        """
        rest = buffer_frames - reference_frames
        if rest < 1 or rest % chunk_frames:
            divisors = [c for c in range(1, max(rest, 0) + 1) if rest % c == 0]
            raise UserError(
                f"chunk_frames {chunk_frames} does not divide B - K = {buffer_frames} - "
                f"{reference_frames} = {rest}; choose chunk_frames from {divisors}"
                if divisors
                else f"reference_frames {reference_frames} leaves no frame of the buffer "
                f"B = {buffer_frames} to denoise; choose fewer"
            )
        return cls(K=reference_frames, N=rest // chunk_frames, c=chunk_frames, s=micro_steps)

    @classmethod
    def from_sampling(cls, buffer_frames: int, sampling: SamplingConfig) -> PartitionScheme:
        """Scheme that a sampling configuration names, on a buffer of B frames."""
        return cls.for_buffer(
            buffer_frames, sampling.chunk_frames, sampling.micro_steps, sampling.reference_frames
        )

    @property
    def buffer_frames(self) -> int:
        """Latent frames in the buffer, B = K + N * c."""
        return self.K + self.N * self.c

    @property
    def total_steps(self) -> int:
        """Denoising steps that a frame undergoes on its way through the buffer, T = s * N."""
        return self.s * self.N

    def segments(self) -> Tensor:
        """Noise segment of every frame, `[B]` int64: N (head) ... 1 (tail), 0 for references."""
        chunks = torch.arange(self.N, 0, -1).repeat_interleave(self.c)
        return torch.cat([torch.zeros(self.K, dtype=torch.long), chunks])

    def positions(self, micro_step: int = 0) -> Tensor:
        """Denoising steps, of T, that every frame has taken at `micro_step`, `[B]` int64.

        The chunk in segment i has taken (i - 1) s + m; reference frames have taken all T.
        """
        assert 0 <= micro_step <= self.s, f"micro step {micro_step} outside 0...{self.s}"
        segments = self.segments()
        taken = (segments - 1) * self.s + micro_step
        return torch.where(segments == 0, self.total_steps, taken)

    def levels(self, micro_step: int, gamma: GammaConfig | None = None) -> Tensor:
        """Staircase of tau at `micro_step` m = 0 ... s, `[B]` float32.

        The chunk in segment i stands at gamma((i - 1) / N + m / (s N)); reference frames at 1.
        At m = s the head chunk is clean and every other chunk stands where the chunk before it
        stood at m = 0.
        """
        return step_levels(self.positions(micro_step), self.total_steps, gamma)


def step_levels(positions: Tensor, total_steps: int, gamma: GammaConfig | None = None) -> Tensor:
    """Tau, float32, of frames that have taken `positions` (any shape) of their T steps."""
    # Whole numbers are divided last, so that levels that coincide in theory coincide in floats.
    return apply_gamma(positions.double() / total_steps, gamma or GammaConfig()).float()


@dataclass(frozen=True)
class PartitionDraw:
    """What the mixture drew for one sample: scheme, `tau [f]`, and `weight [f]` of the loss."""

    scheme: PartitionScheme
    tau: Tensor
    weight: Tensor


class PartitionMixture:
    """Mixed training: partitions drawn at random, one per sample (arXiv:2507.03745v4, Tab. 3)."""

    def __init__(self, config: PartitionConfig, buffer_frames: int) -> None:
        self.gamma = config.gamma
        self.schemes = [
            PartitionScheme.for_buffer(
                buffer_frames, entry.chunk_frames, reference_frames=entry.reference_frames
            )
            for entry in config.entries
        ]
        self._weights = torch.tensor([entry.weight for entry in config.entries])

    def draw(self, generator: torch.Generator) -> PartitionDraw:
        """Draw a scheme and one tau per chunk (arXiv:2507.03745v4, Eq. 8).

        The chunk in segment i gets gamma(t_i) with t_i ~ Uniform[(i - 1) / N, i / N], drawn
        independently per chunk. Reference frames have tau = 1 and loss weight 0; the other
        weights are scaled to a mean of 1 over the buffer.
        """
        index = torch.multinomial(self._weights, 1, generator=generator)
        scheme = self.schemes[int(index)]
        position = torch.rand(scheme.N, generator=generator)
        # Chunks run from the head, so their segments run from N down to 1.
        t = (torch.arange(scheme.N - 1, -1, -1) + position) / scheme.N
        chunks = apply_gamma(t, self.gamma).repeat_interleave(scheme.c)
        tau = torch.cat([torch.ones(scheme.K), chunks])
        weight = (torch.arange(scheme.buffer_frames) >= scheme.K).float()
        return PartitionDraw(scheme, tau, weight / weight.mean())

    def serves(self, scheme: PartitionScheme) -> bool:
        """Whether a model trained on this mixture can be sampled with `scheme` (any s)."""
        return any((known.K, known.c) == (scheme.K, scheme.c) for known in self.schemes)

    @property
    def makes_first_video(self) -> bool:
        """Whether ordinary text-to-video (K = 0, c = B), which begins a stream, is in the mix."""
        return any((known.K, known.N) == (0, 1) for known in self.schemes)

    def describe(self) -> str:
        """The schemes of the mix, for messages."""
        return ", ".join(f"K={scheme.K} c={scheme.c}" for scheme in self.schemes)
