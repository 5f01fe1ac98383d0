"""From clean latents to pictures, chunk after chunk, beside the denoiser.

Decoding a chunk needs nothing but its latents and what the decoder kept of the chunks before, so
on a CUDA device it runs on a stream of its own while the denoiser takes its next step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from streamdit.autoencoder.base import Autoencoder, DecoderState
from streamdit.config import StrictModel
from streamdit.model.compiling import compile_for_fixed_shapes


class DecoderConfig(StrictModel):
    """How a stream decodes."""

    overlap: bool = False
    """Take the steps of the next chunk before the current one is handed out, so that decoding,
    denoising and whatever is done with the pictures run at the same time. A new prompt then shows
    one chunk later."""
    bfloat16: bool = False
    """Decode with a copy of the autoencoder in bfloat16; pictures change by rounding."""
    channels_last: bool = False
    """Keep the channels of a voxel together in memory, which convolutions on GPUs prefer."""
    compile: bool = False
    """Compile the decoder with `torch.compile`; the first two chunks take minutes."""
    cudnn_autotune: bool = False
    """Let cuDNN time its convolutions at the first two chunks and keep the fastest; may take more
    memory, and another run may keep others. Without effect on a CPU."""


@dataclass
class PendingFrames:
    """Frames on their way to the host."""

    pixels: Tensor
    """uint8 `[n, H, W, 3]` on the CPU, valid once `ready` has happened."""
    ready: torch.cuda.Event | None = None

    def wait(self) -> np.ndarray:
        """The frames, uint8 `[n, H, W, 3]`, as soon as they are there."""
        if self.ready is None:
            return self.pixels.numpy()
        self.ready.synchronize()
        # A copy, since page-locked memory is scarce and frames may be kept for long.
        return self.pixels.numpy().copy()


class ChunkDecoder:
    """Decodes the latents of one stream and carries the decoder's state from chunk to chunk.

    Args:
        autoencoder: what decodes; not changed.
        device: where it is.
        config: how to decode.
    """

    def __init__(
        self, autoencoder: Autoencoder, device: torch.device, config: DecoderConfig | None = None
    ) -> None:
        config = config or DecoderConfig()
        self._autoencoder = converted(autoencoder, config.bfloat16, config.channels_last)
        self._decode: Callable[..., tuple[Tensor, Any]] = self._autoencoder.decode
        if config.compile:
            self._decode = compile_for_fixed_shapes(self._autoencoder.decode)
        self._autotune = config.cudnn_autotune
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._state: DecoderState = None

    @property
    def state(self) -> DecoderState:
        """What the decoder carries; None at the start of a stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return self._state

    @state.setter
    def state(self, state: DecoderState) -> None:
        if self._stream is not None:
            # Copied into memory of the decoder's own stream, whose reuse follows its work.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                state = tree_map_only(Tensor, Tensor.clone, state)
            self._stream.synchronize()
        self._state = state

    @torch.no_grad()
    def submit(self, latents: Tensor) -> PendingFrames:
        """Begin to decode the next latents `[1, f, C, h, w]` (normalised) of the stream."""
        if self._stream is None:
            return PendingFrames(self._pixels(latents))
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            pixels = self._pixels(latents)
            # The denoiser's stream must not reuse this memory before the decoder has read it.
            latents.record_stream(self._stream)
            host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
            return PendingFrames(host, self._stream.record_event())

    def _pixels(self, latents: Tensor) -> Tensor:
        raw = self._autoencoder.denormalise(latents)
        with cudnn_autotuning(self._autotune):
            frames, self._state = self._decode(raw, self._state)
        return to_pixels(frames[0])


_CONVERTED: WeakKeyDictionary[Autoencoder, dict[tuple[bool, bool], Autoencoder]] = (
    WeakKeyDictionary()
)
"""Copies of autoencoders, which all streams of a model share."""


def converted(autoencoder: Autoencoder, bfloat16: bool, channels_last: bool) -> Autoencoder:
    """A copy of `autoencoder` in another precision or memory layout, made once and kept with it.

    Without either it is `autoencoder` itself.
    """
    if not (bfloat16 or channels_last):
        return autoencoder
    copies = _CONVERTED.setdefault(autoencoder, {})
    key = bfloat16, channels_last
    if key not in copies:
        made = copy.deepcopy(autoencoder)
        if bfloat16:
            made = made.bfloat16()
        if channels_last:
            put_channels_last(made)
        copies[key] = made
    return copies[key]


def put_channels_last(module: nn.Module) -> None:
    """Lay the weights of convolutions out with their channels last, whether 2D or 3D.

    `Module.to(memory_format=...)` takes one format for all and refuses a module with both.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


@contextmanager
def cudnn_autotuning(wanted: bool) -> Iterator[None]:
    """Let cuDNN choose its convolutions by timing them; as it was for whatever comes after."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def to_pixels(frames: Tensor) -> Tensor:
    """Frames `[..., 3, H, W]` in -1...1 to uint8 `[..., H, W, 3]`, where they are."""
    pixels = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1).contiguous()


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames `[..., 3, H, W]` in -1...1 to uint8 `[..., H, W, 3]` on the host."""
    array: np.ndarray = to_pixels(frames).cpu().numpy()
    return array
