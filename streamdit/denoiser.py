"""The stream queue: a buffer that denoises, emits its head and takes in noise, for ever.

See arXiv:2507.03745v4, Secs. 3.2 and 3.5, Figs. 11-13.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamdit.config import GammaConfig
from streamdit.devices import to_device
from streamdit.errors import UserError
from streamdit.flow import VelocityFunction, euler_step, per_frame
from streamdit.model import StreamDiT
from streamdit.model.fast import FastConfig, FastVelocity
from streamdit.partition import PartitionScheme
from streamdit.schedule import StreamSchedule
from streamdit.start import Guide, StreamStart
from streamdit.steps import PlainVelocity, StepVelocity
from streamdit.text.base import TextStates

LatentShape = tuple[int, int, int]


def frame_noise(seed: int, frame: int, shape: LatentShape) -> Tensor:
    """Standard normal noise `[C, h, w]` float32 of one latent frame of one stream.

    A pure function of (seed, absolute frame index), so that a paused, resumed or replayed stream
    meets the same noise. Drawn on the CPU, so every device meets the same noise too.
    """
    digest = hashlib.blake2b(f"{seed}:{frame}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


def advance_buffer(
    buffer: Tensor, entering: Tensor, scheme: PartitionScheme
) -> tuple[Tensor, Tensor]:
    """Take the head chunk out of a buffer whose head is clean, and let frames in at its tail.

    The last K of the frames that are clean become the references.

    Args:
        buffer: `[b, B, C, h, w]`.
        entering: noise `[b, c, C, h, w]`.
        scheme: partition of the buffer.

    Returns:
        The head chunk `[b, c, C, h, w]` and the buffer `[b, B, C, h, w]` behind it.
    """
    emitted = buffer[:, scheme.K : scheme.K + scheme.c].clone()
    return emitted, torch.cat([buffer[:, scheme.c :], entering], dim=1)


class Denoiser:
    """Moves the buffers of b streams in step, by one Euler step per call.

    A stream first fills its buffer, as :class:`streamdit.schedule.StreamSchedule` plans it. From
    then on each s steps free the head chunk and let noise in at the tail. With K = 0 the first
    video is needed only up to the head chunk's level, so its last s steps are not taken.

    Args:
        model: velocity function, as :class:`streamdit.model.StreamDiT`.
        scheme: partition of the buffer.
        latent_shape: `(C, h, w)` of a latent frame.
        seeds: seed of each stream; fixes b.
        gamma: noise schedule that the model was trained with.
        guidance_scale: classifier-free guidance weight w; 1 takes one evaluation per step.
        device: where the buffer lives; it is kept in float32, since Euler steps add up.
        start: how the first buffer is filled, and what video the stream follows or continues.
    """

    def __init__(
        self,
        model: VelocityFunction,
        scheme: PartitionScheme,
        latent_shape: LatentShape,
        seeds: Sequence[int],
        gamma: GammaConfig | None = None,
        guidance_scale: float = 1.0,
        device: torch.device | str = "cpu",
        start: StreamStart | None = None,
    ) -> None:
        start = start or StreamStart()
        self.model = model
        self.scheme = scheme
        self.latent_shape = latent_shape
        self.seeds = [int(seed) for seed in seeds]
        self.gamma = gamma or GammaConfig()
        self.guidance_scale = guidance_scale
        self.device = torch.device(device)
        self.guide = start.guide
        self.schedule = StreamSchedule(
            scheme, self.gamma, start.kind, references_given=start.references is not None
        ).to(self.device)
        self._velocity_at: StepVelocity = PlainVelocity(model, self.schedule.levels, guidance_scale)
        self._text: TextStates | None = None
        self._null_text: TextStates | None = None
        self._step = 0
        # With given references the stream's first frame comes behind them.
        given = scheme.K if start.references is not None else 0
        self._first_frame = -given
        noise = self._noise(0, scheme.buffer_frames - given)
        if start.references is not None:
            references = start.references.to(noise).expand(len(noise), -1, -1, -1, -1)
            noise = torch.cat([references, noise], dim=1)
        self._buffer = noise
        self._queue = noise.clone()
        self._guide_velocity = torch.zeros_like(noise)
        self._follow(0, noise[:, given:])

    def _noise(self, first: int, count: int) -> Tensor:
        """Noise of frames `first` ... of every stream, `[b, count, C, h, w]`."""
        rows = [
            torch.stack(
                [frame_noise(seed, first + offset, self.latent_shape) for offset in range(count)]
            )
            for seed in self.seeds
        ]
        return to_device(torch.stack(rows), self.device)

    @property
    def filling(self) -> bool:
        """Whether the stream is still filling its first buffer."""
        return self._step < self.schedule.fill_steps

    @property
    def buffer(self) -> Tensor:
        """The latents under way, `[b, B, C, h, w]`."""
        return self._buffer

    @property
    def steps_taken(self) -> int:
        """Denoising steps since the start of the stream."""
        return self._step

    def tau(self) -> Tensor:
        """Times `[B]` of the buffer's frames that the next step starts from."""
        return self.schedule.levels[self.schedule.row(self._step)]

    def set_text(self, text: TextStates, null_text: TextStates | None = None) -> None:
        """Prompt states of the b streams from the next step on, and of the empty prompt.

        Raises:
            UserError: if they do not fit; the prompts in force then stay so.
        """
        assert text.batch == len(self.seeds)
        text = text.to(self.device)
        null_text = null_text.to(self.device) if null_text is not None else None
        self._velocity_at.set_text(text, null_text)
        self._text, self._null_text = text, null_text

    def accelerate(self, config: FastConfig, max_text_tokens: int) -> None:
        """Take the steps from here on as `config` says; the video stays the same within rounding.

        Args:
            config: which optimisations to use.
            max_text_tokens: most text tokens that a prompt can have.
        """
        assert isinstance(self.model, StreamDiT), "only the network itself can be accelerated"
        self._velocity_at = FastVelocity(
            self.model,
            self.schedule.levels,
            self.latent_shape,
            len(self.seeds),
            self.guidance_scale,
            config,
            max_text_tokens,
        )
        if self._text is not None:
            self._velocity_at.set_text(self._text, self._null_text)

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """Take one denoising step.

        Returns:
            The latents that became clean, `[b, n, C, h, w]` normalised: the reference frames once
            at the start (K > 0 and none given), then the head chunk (n = c) after every s steps;
            else None.
        """
        schedule = self.schedule
        row = schedule.row(self._step)
        if self.filling:
            self._set_aside()
        tau, next_tau = schedule.levels[row], schedule.levels[row + 1]
        self._buffer = euler_step(self._buffer, self._velocity(row), tau, next_tau)
        self._step += 1
        if self._step <= schedule.fill_steps:
            return self._finish_filling() if self._step == schedule.fill_steps else None
        done = (self._step - schedule.fill_steps) % self.scheme.s == 0
        return self._advance() if done else None

    def _velocity(self, row: int) -> Tensor:
        """Velocity of the buffer: the model's, the guide's for frames that still follow it."""
        followed = self._followed(row)
        if followed is not None and bool(followed.all()):
            return self._guide_velocity
        assert self._text is not None, "set_text comes before the first step"
        velocity = self._velocity_at(self._buffer, row)
        if followed is None:
            return velocity
        mask = per_frame(to_device(followed, self.device))
        return torch.where(mask, self._guide_velocity.to(velocity), velocity)

    def _followed(self, row: int) -> Tensor | None:
        """Which frames `[B]` (on the CPU) follow the guide in this step or rest; None for none."""
        if self.guide is None:
            return None
        taken, after = self.schedule.positions[row], self.schedule.positions[row + 1]
        frames = torch.arange(self.scheme.buffer_frames) + self._first_frame
        guided = (frames >= 0) & (frames < self.guide.latents.shape[1])
        following = guided & (taken < self.guide.followed_steps(self.scheme.total_steps))
        return (following | (taken == after)) if following.any() else None

    def _follow(self, first: int, noise: Tensor) -> None:
        """Take in the guide's velocities for the frames `first` ... that enter as `noise`."""
        if self.guide is None:
            return
        velocity = torch.cat([self._guide_velocity, self.guide.velocity(first, noise)], dim=1)
        self._guide_velocity = velocity[:, -self.scheme.buffer_frames :]

    def _set_aside(self) -> None:
        """Keep the frames that stand at their own level of the staircase."""
        place = self.schedule.set_aside[self._step]
        if place is not None:
            frames = slice(*place)
            self._queue[:, frames] = self._buffer[:, frames]

    def _finish_filling(self) -> Tensor | None:
        """The first video is done: the queue holds every chunk at its own level."""
        self._set_aside()
        self._buffer = self._queue
        return self._buffer[:, : self.scheme.K].clone() if self.schedule.emits_references else None

    def _advance(self) -> Tensor:
        """Emit the head chunk, move up by c frames, let noise in at the tail."""
        scheme = self.scheme
        entering = self._first_frame + scheme.buffer_frames
        noise = self._noise(entering, scheme.c)
        self._first_frame += scheme.c
        self._follow(entering, noise)
        emitted, self._buffer = advance_buffer(self._buffer, noise, scheme)
        return emitted

    def state(self) -> dict[str, Any]:
        """All that changes as the stream moves, for :meth:`restore`; tensors are copies."""
        return {
            "plan": self._plan(),
            "seeds": list(self.seeds),
            "step": self._step,
            "first_frame": self._first_frame,
            "buffer": self._buffer.clone(),
            "queue": self._queue.clone(),
            "guide": vars(self.guide) if self.guide is not None else None,
            "guide_velocity": self._guide_velocity.clone(),
            "text": self._text,
            "null_text": self._null_text,
        }

    def _plan(self) -> dict[str, Any]:
        """What fixes the course of the stream, apart from seeds and prompts."""
        return {
            **vars(self.scheme),
            "latent_shape": tuple(self.latent_shape),
            "gamma": self.gamma.model_dump(),
            "guidance_scale": self.guidance_scale,
            "start": self.schedule.start,
            "references_given": self.schedule.references_given,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly from a :meth:`state` of a denoiser that was made alike.

        Raises:
            UserError: if the state is that of another scheme, latent, noise schedule, guidance,
                start or batch.
        """
        theirs = {**state["plan"], "videos": len(state["seeds"])}
        for name, value in {**self._plan(), "videos": len(self.seeds)}.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"the saved stream has {name}={theirs.get(name)} but this one {value}; start "
                    "it with the settings that it was saved with"
                )
        self.seeds = list(state["seeds"])
        self._step = state["step"]
        self._first_frame = state["first_frame"]
        self._buffer = state["buffer"].to(self.device, copy=True)
        self._queue = state["queue"].to(self.device, copy=True)
        self.guide = Guide(**state["guide"]) if state["guide"] is not None else None
        self._guide_velocity = state["guide_velocity"].to(self.device, copy=True)
        if state["text"] is not None:
            self.set_text(state["text"], state["null_text"])
