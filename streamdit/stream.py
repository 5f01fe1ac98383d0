"""The stream queue: a buffer that denoises, emits its head and takes in noise, for ever.

:class:`Denoiser` moves the buffer of one or several streams; :class:`Stream` adds prompt and
decoder and yields video (arXiv:2507.03745v4, Secs. 3.2 and 3.5, Figs. 11-13).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamdit.autoencoder.base import Autoencoder
from streamdit.config import GammaConfig
from streamdit.errors import UserError
from streamdit.flow import VelocityFunction, euler_step, guided_velocity
from streamdit.partition import PartitionScheme
from streamdit.text.base import TextEncoders, TextStates

LatentShape = tuple[int, int, int]


def frame_noise(seed: int, frame: int, shape: LatentShape) -> Tensor:
    """Standard normal noise `[C, h, w]` float32 of one latent frame of one stream.

    A pure function of (seed, absolute frame index), so that a paused, resumed or replayed stream
    meets the same noise. Drawn on the CPU, so every device meets the same noise too.
    """
    digest = hashlib.blake2b(f"{seed}:{frame}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


class Denoiser:
    """Moves the buffers of b streams in step, by one Euler step per call.

    A stream begins as ordinary text-to-video: all frames share one time and take the T steps of
    the scheme, and every chunk leaves that trajectory for the queue at its own noise level
    (arXiv:2507.03745v4, Fig. 13). From then on each s steps free the head chunk and let noise in
    at the tail. With K = 0 the first video is needed only up to the head chunk's level, so its
    last s steps are not taken.

    Args:
        model: velocity function, as :class:`streamdit.model.StreamDiT`.
        scheme: partition of the buffer.
        latent_shape: `(C, h, w)` of a latent frame.
        seeds: seed of each stream; fixes b.
        gamma: noise schedule that the model was trained with.
        guidance_scale: classifier-free guidance weight w; 1 takes one evaluation per step.
        device: where the buffer lives; it is kept in float32, since Euler steps add up.
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
    ) -> None:
        self.model = model
        self.scheme = scheme
        self.latent_shape = latent_shape
        self.seeds = list(seeds)
        self.guidance_scale = guidance_scale
        self.device = torch.device(device)
        uniform = PartitionScheme(K=0, N=1, c=scheme.buffer_frames, s=scheme.total_steps)
        self._fill_levels = self._staircase(uniform, gamma)
        self._levels = self._staircase(scheme, gamma)
        self._fill_steps = scheme.total_steps if scheme.K else (scheme.N - 1) * scheme.s
        self._text: TextStates | None = None
        self._null_text: TextStates | None = None
        self._step = 0
        self._frames_drawn = scheme.buffer_frames
        self._buffer = self._noise(0, scheme.buffer_frames)
        self._queue = self._buffer.clone()

    def _staircase(self, scheme: PartitionScheme, gamma: GammaConfig | None) -> Tensor:
        levels = [scheme.levels(m, gamma) for m in range(scheme.s + 1)]
        return torch.stack(levels).to(self.device)

    def _noise(self, first: int, count: int) -> Tensor:
        """Noise of frames `first` ... of every stream, `[b, count, C, h, w]`."""
        rows = [
            torch.stack(
                [frame_noise(seed, first + offset, self.latent_shape) for offset in range(count)]
            )
            for seed in self.seeds
        ]
        return torch.stack(rows).to(self.device)

    @property
    def filling(self) -> bool:
        """Whether the stream is still making its first video."""
        return self._step < self._fill_steps

    @property
    def buffer(self) -> Tensor:
        """The latents under way, `[b, B, C, h, w]`; all at one level while filling."""
        return self._buffer

    def tau(self) -> Tensor:
        """Times `[B]` of the buffer's frames that the next step starts from."""
        return self._times()[0]

    def _times(self) -> tuple[Tensor, Tensor]:
        if self.filling:
            return self._fill_levels[self._step], self._fill_levels[self._step + 1]
        micro_step = (self._step - self._fill_steps) % self.scheme.s
        return self._levels[micro_step], self._levels[micro_step + 1]

    def set_text(self, text: TextStates, null_text: TextStates | None = None) -> None:
        """Prompt states of the b streams from the next step on, and of the empty prompt."""
        assert text.batch == len(self.seeds)
        self._text = text.to(self.device)
        self._null_text = null_text.to(self.device) if null_text is not None else None

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """Take one denoising step.

        Returns:
            The latents that became clean, `[b, n, C, h, w]` normalised: the reference frames once
            at the start (K > 0), then the head chunk (n = c) after every s steps; else None.
        """
        assert self._text is not None, "set_text comes before the first step"
        scheme = self.scheme
        if self.filling and self._step % scheme.s == 0:
            self._enqueue_chunk(segment=self._step // scheme.s + 1)
        tau, next_tau = self._times()
        batch_tau = tau.expand(len(self.seeds), -1)
        velocity = guided_velocity(
            self.model,
            self._buffer,
            batch_tau,
            self._text,
            self._null_text,
            self.guidance_scale,
        )
        self._buffer = euler_step(self._buffer, velocity, tau, next_tau)
        self._step += 1
        if self._step <= self._fill_steps:
            return self._finish_filling() if self._step == self._fill_steps else None
        done = (self._step - self._fill_steps) % scheme.s == 0
        return self._advance() if done else None

    def _enqueue_chunk(self, segment: int) -> None:
        """Keep the frames of the chunk that starts in `segment`, at their level there."""
        scheme = self.scheme
        start = scheme.K + (scheme.N - segment) * scheme.c
        chunk = slice(start, start + scheme.c)
        self._queue[:, chunk] = self._buffer[:, chunk]

    def _finish_filling(self) -> Tensor | None:
        """The first video is done: the queue holds every chunk at its own level."""
        scheme = self.scheme
        if scheme.K == 0:
            self._enqueue_chunk(segment=scheme.N)
        else:
            self._queue[:, : scheme.K] = self._buffer[:, : scheme.K]
        self._buffer = self._queue
        return self._buffer[:, : scheme.K].clone() if scheme.K else None

    def _advance(self) -> Tensor:
        """Emit the head chunk, move up by c frames, let noise in at the tail."""
        scheme = self.scheme
        # What is clean now: the references and the head chunk; its last K become the references.
        clean, rest = self._buffer.split(
            [scheme.K + scheme.c, scheme.buffer_frames - scheme.K - scheme.c], dim=1
        )
        emitted = clean[:, scheme.K :].clone()
        noise = self._noise(self._frames_drawn, scheme.c)
        self._frames_drawn += scheme.c
        self._buffer = torch.cat([clean[:, scheme.c :], rest, noise], dim=1)
        return emitted

    def state(self) -> dict[str, Any]:
        """All that changes as the stream moves, for :meth:`restore`; tensors are copies."""
        return {
            "step": self._step,
            "frames_drawn": self._frames_drawn,
            "buffer": self._buffer.clone(),
            "queue": self._queue.clone(),
            "text": self._text,
            "null_text": self._null_text,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly from a :meth:`state`."""
        self._step = state["step"]
        self._frames_drawn = state["frames_drawn"]
        self._buffer = state["buffer"].clone()
        self._queue = state["queue"].clone()
        self._text = state["text"]
        self._null_text = state["null_text"]


@dataclass(frozen=True)
class StreamChunk:
    """Decoded frames of a stream.

    Attributes:
        frames: uint8 `[n, H, W, 3]`.
        first_frame: index of `frames[0]` since the start of the stream.
        prompt_version: number of prompt changes that the stream had seen when the chunk left.
    """

    frames: np.ndarray
    first_frame: int
    prompt_version: int


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames `[..., 3, H, W]` in -1...1 to uint8 `[..., H, W, 3]`."""
    pixels = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


class Stream(Iterator[StreamChunk]):
    """An endless video: iterate for chunks, assign :attr:`prompt` to steer it.

    A new prompt is encoded once and conditions every step after it; chunks that are nearly clean
    by then follow it less (arXiv:2507.03745v4, Fig. 12).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        text_encoders: TextEncoders,
        prompt: str,
    ) -> None:
        if len(denoiser.seeds) != 1:
            raise UserError(
                f"a Stream shows one video but its denoiser moves {len(denoiser.seeds)}; "
                "give it one seed"
            )
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.text_encoders = text_encoders
        self.prompt_version = -1
        self._frames = 0
        self._decoder_state: Any = None
        self.prompt = prompt

    @property
    def prompt(self) -> str:
        """The prompt in force."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._prompt = prompt
        self.prompt_version += 1
        null = self.denoiser.guidance_scale != 1.0
        states = self.text_encoders.encode([prompt, ""] if null else [prompt])
        # Unpadded, so that a stream's states do not depend on what was encoded beside them.
        prompts = [TextStates.collate([sample]) for sample in states.unpadded()]
        self.denoiser.set_text(prompts[0], prompts[1] if null else None)

    def __next__(self) -> StreamChunk:
        latents = None
        while latents is None:
            latents = self.denoiser.step()
        return self._decode(latents)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> StreamChunk:
        raw = self.autoencoder.denormalise(latents)
        frames, self._decoder_state = self.autoencoder.decode(raw, self._decoder_state)
        chunk = StreamChunk(to_uint8(frames[0]), self._frames, self.prompt_version)
        self._frames += len(chunk.frames)
        return chunk

    def state(self) -> dict[str, Any]:
        """All that changes as the stream moves, for :meth:`restore`."""
        return {
            "denoiser": self.denoiser.state(),
            "decoder": self._decoder_state,
            "frames": self._frames,
            "prompt": self._prompt,
            "prompt_version": self.prompt_version,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly from a :meth:`state`."""
        self.denoiser.restore(state["denoiser"])
        self._decoder_state = state["decoder"]
        self._frames = state["frames"]
        self._prompt = state["prompt"]
        self.prompt_version = state["prompt_version"]
