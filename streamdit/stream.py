"""A stream of video: prompt and decoder around the denoiser (arXiv:2507.03745v4, Fig. 11)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamdit.autoencoder.base import Autoencoder
from streamdit.decoding import ChunkDecoder, DecoderConfig, PendingFrames
from streamdit.denoiser import Denoiser
from streamdit.errors import UserError
from streamdit.state import load_state, save_state
from streamdit.text.base import TextEncoders, TextStates


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


@dataclass
class PendingChunk:
    """A chunk whose frames may still be on their way."""

    frames: PendingFrames
    first_frame: int
    prompt_version: int

    def wait(self) -> StreamChunk:
        """The chunk, as soon as its frames are there."""
        return StreamChunk(self.frames.wait(), self.first_frame, self.prompt_version)


class Stream(Iterator[StreamChunk]):
    """An endless video: iterate for chunks, assign :attr:`prompt` to steer it.

    A new prompt is encoded once and conditions every step after it; chunks that are nearly clean
    by then follow it less (arXiv:2507.03745v4, Fig. 12).

    Args:
        denoiser: moves the latents of one video.
        autoencoder: decodes them.
        text_encoders: encode the prompts.
        prompt: the first prompt.
        history: latents `[1, f, C, h, w]`, normalised, that were played before the stream, for
            the decoder to go on from without a seam.
        decoder: how to decode.
        identity: hashes of the weights behind the stream, by what they are the weights of; a saved
            stream is continued with the same only.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        text_encoders: TextEncoders,
        prompt: str,
        history: Tensor | None = None,
        decoder: DecoderConfig | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        if len(denoiser.seeds) != 1:
            raise UserError(
                f"a Stream shows one video but its denoiser moves {len(denoiser.seeds)}; "
                "give it one seed"
            )
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.text_encoders = text_encoders
        self.identity = dict(identity or {})
        self.prompt_version = -1
        self._decoder = ChunkDecoder(autoencoder, denoiser.device, decoder)
        self._overlap = decoder is not None and decoder.overlap
        self._ahead: PendingChunk | None = None
        self._frames = 0
        if history is not None:
            self._decoder.submit(history)
        self.prompt = prompt

    @property
    def prompt(self) -> str:
        """The prompt in force."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        null = self.denoiser.guidance_scale != 1.0
        states = self.text_encoders.encode([prompt, ""] if null else [prompt])
        # Unpadded, so that a stream's states do not depend on what was encoded beside them.
        prompts = [TextStates.collate([sample]) for sample in states.unpadded()]
        self.denoiser.set_text(prompts[0], prompts[1] if null else None)
        self._prompt = prompt
        self.prompt_version += 1

    def __next__(self) -> StreamChunk:
        chunk = self._ahead or self._begin()
        self._ahead = self._begin() if self._overlap else None
        return chunk.wait()

    def _begin(self) -> PendingChunk:
        """Take the steps that free the next chunk, and begin to decode it."""
        latents = None
        while latents is None:
            latents = self.denoiser.step()
        frames = self._decoder.submit(latents)
        chunk = PendingChunk(frames, self._frames, self.prompt_version)
        self._frames += len(frames.pixels)
        return chunk

    def state(self) -> dict[str, Any]:
        """All that changes as the stream moves, for :meth:`restore`."""
        ahead = None
        if self._ahead is not None:
            ahead = {**vars(self._ahead), "frames": torch.from_numpy(self._ahead.frames.wait())}
        return {
            "identity": dict(self.identity),
            "denoiser": self.denoiser.state(),
            "decoder": self._decoder.state,
            "ahead": ahead,
            "frames": self._frames,
            "prompt": self._prompt,
            "prompt_version": self.prompt_version,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly from a :meth:`state`.

        Raises:
            UserError: if it is that of another model, or of another kind of stream.
        """
        theirs = state.get("identity", {})
        for name in sorted({*theirs, *self.identity}):
            saved, mine = (known.get(name) or "unknown" for known in (theirs, self.identity))
            if saved != mine:
                of = " of SHA-256" if name.endswith("weights") else ""
                raise UserError(
                    f"the saved stream was made with the {name}{of} {saved[:12]}, not "
                    f"{mine[:12]}; continue it with the model that made it, as it was loaded then"
                )
        self.denoiser.restore(state["denoiser"])
        self._decoder.state = state["decoder"]
        self._ahead = None
        if (ahead := state["ahead"]) is not None:
            self._ahead = PendingChunk(**{**ahead, "frames": PendingFrames(ahead["frames"].cpu())})
        self._frames = state["frames"]
        self._prompt = state["prompt"]
        self.prompt_version = state["prompt_version"]

    def save(self, path: Path | str) -> Path:
        """Write :meth:`state` to a file; :meth:`StreamingModel.resume` continues from it.

        The file is safetensors: numbers and text in its header, no code.
        """
        return save_state(self.state(), path)

    def load(self, path: Path | str) -> None:
        """Continue exactly from a file of :meth:`save`.

        Raises:
            UserError: if it is none, or that of another kind of stream.
        """
        self.restore(load_state(path, self.denoiser.device))
