"""The streaming step without what repeats: tables, text memories, compiled blocks, CUDA graph.

Every optimisation is a switch of :class:`FastConfig`, and none changes what a step computes: the
velocity equals the plain network's within rounding (`tests/streamdit/test_model_fast.py`).
Only `float8` rounds more, and says so.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamdit.config import StrictModel
from streamdit.errors import UserError
from streamdit.model.block import Block, TextMemory, WindowContext
from streamdit.model.compiling import compile_for_fixed_shapes
from streamdit.model.dit import StreamDiT
from streamdit.model.prepared import Signals, TextMemories
from streamdit.model.quantise import with_float8_linears
from streamdit.text.base import TextStates

FLOAT8_CAPABILITY = (8, 9)
"""First CUDA compute capability that multiplies in e4m3."""

POOL_STREAMS = 32
"""CUDA streams of one priority that PyTorch deals out, per device."""

_STREAMS_IN_USE: set[tuple[int, int]] = set()
"""Device and handle of the CUDA streams that living graphs were captured on."""

AttentionKernel = Literal["auto", "flash", "cudnn"]

_OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PREFERENCES = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_OTHERS],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_OTHERS],
}
"""Kernels in the order in which they are tried; not every one takes a mask, or every device."""


class FastConfig(StrictModel):
    """Which optimisations the steps of a stream run with."""

    modulation_table: bool = True
    """Compute every scale, shift and gate of the schedule once (float32, as in the plain step)."""
    text_memory: bool = True
    """Project the prompt to keys and values once per prompt, not once per step."""
    compile: bool = False
    """Compile the blocks: fuses norm, modulation, rotary positions and windows. The first step
    takes longer."""
    autotune: bool = False
    """With `compile`: time the library's matrix products against generated ones, and ways to
    generate everything else (`torch.compile(mode="max-autotune-no-cudagraphs")`). The first step
    takes longer still."""
    cuda_graph: bool = False
    """Replay the step as one CUDA graph; needs a CUDA device, and `text_memory`."""
    attention: AttentionKernel = "auto"
    """Attention kernel to prefer: PyTorch's own choice, FlashAttention, or cuDNN's."""
    float8: bool = False
    """Multiply in e4m3 inside the blocks (:mod:`streamdit.model.quantise`); needs a GPU of compute
    capability 8.9 or more to be fast. Changes the velocity by less than
    :data:`streamdit.model.quantise.ERROR_BOUND` of its norm."""
    packed_text: bool = True
    """Leave the padding of prompts out of text attention, where the device has a kernel for that
    (:mod:`streamdit.model.packed`); it is masked elsewhere, and without this."""
    text_tokens: int | None = Field(default=None, gt=0)
    """Text tokens that compiled or captured steps make room for; default: the most that the text
    encoders give. Fewer save memory, and work where padding is computed too: on CPUs, in float32,
    and before PyTorch 2.10."""

    @property
    def static_text(self) -> bool:
        """Whether text memories must keep their place and size from prompt to prompt."""
        return self.text_memory and (self.compile or self.cuda_graph)


class FastVelocity:
    """Velocity of a stream's buffer at the steps of a schedule; a drop-in for the plain network.

    Args:
        model: the network, in evaluation mode; its weights must not change any more.
        levels: times `[rows, B]` float32 that steps start from.
        latent_shape: `(C, h, w)` of a latent frame.
        batch: streams that move together, b.
        guidance_scale: classifier-free guidance weight w; unless 1, prompt and empty prompt run
            as one batch of 2 b.
        config: which optimisations to use.
        max_text_tokens: most text tokens that a prompt can have; needed where text memories keep
            their size and `config.text_tokens` is not set.

    Raises:
        UserError: if the device cannot do what `config` asks for.
    """

    def __init__(
        self,
        model: StreamDiT,
        levels: Tensor,
        latent_shape: tuple[int, int, int],
        batch: int = 1,
        guidance_scale: float = 1.0,
        config: FastConfig | None = None,
        max_text_tokens: int | None = None,
    ) -> None:
        self.config = config = config or FastConfig()
        device = levels.device
        check_supported(config, device, model.patch_embedding.weight.dtype)
        self.guidance_scale = guidance_scale
        self._model = with_float8_linears(model) if config.float8 else model
        parts: list[Callable[..., Tensor]] = [StreamDiT.embed_latents, run_block, run_output]
        if config.compile:
            parts = [compiled(part, config.autotune) for part in parts]
        self._begin, self._block, self._end = parts
        shape = (batch, levels.shape[1], *latent_shape)
        with torch.no_grad():
            self._signals = Signals(self._model, levels, config.modulation_table)
            self._contexts = self._model.window_contexts(shape, device)
        capacity = (config.text_tokens or max_text_tokens) if config.static_text else None
        assert capacity or not config.static_text, "static text memories need max_text_tokens"
        self._memories = TextMemories(self._model, capacity, config.packed_text)
        self._text: TextStates | None = None
        self._graph = StepGraph(shape, device) if config.cuda_graph else None

    @torch.no_grad()
    def set_text(self, text: TextStates, null_text: TextStates | None = None) -> None:
        """Prompts of the b streams from the next step on, and the empty prompt for guidance."""
        if self.guidance_scale != 1.0:
            assert null_text is not None, "guidance needs the states of the empty prompt"
            text = TextStates.concatenate([text, null_text.expand(text.batch)])
        self._memories.set(self._model.project_text(text))
        self._text = text

    @torch.no_grad()
    def __call__(self, latents: Tensor, row: int) -> Tensor:
        """Velocity `[b, B, C, h, w]` of `latents` at row `row` of the levels.

        The result may be overwritten by the next call.
        """
        assert self._text is not None, "set_text comes before the first step"
        self._signals.select(row)
        if not self.config.text_memory:
            self._memories.set(self._model.project_text(self._text))
        if self._graph is None:
            return self._evaluate(latents)
        return self._graph(self._evaluate, latents)

    def _evaluate(self, latents: Tensor) -> Tensor:
        if self.guidance_scale == 1.0:
            return self._network(latents)
        conditional, unconditional = self._network(torch.cat([latents, latents])).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _network(self, latents: Tensor) -> Tensor:
        """The network on `latents [b, f, C, h, w]`, from what is prepared."""
        model, signals, kernel = self._model, self._signals, self.config.attention
        x = self._begin(model, latents)
        for index, block in enumerate(model.blocks):
            # [f, 6, d] to six tensors [f, 1, d]
            frame_signals = signals.blocks[:, index].unsqueeze(2).unbind(1)
            memory, windows = self._memories.of_block(index), self._contexts[index % 2]
            x = self._block(block, x, frame_signals, memory, windows, kernel)
        return self._end(model, x, signals.output.unsqueeze(2).unbind(1), latents)


def compiled(function: Callable[..., Tensor], autotune: bool = False) -> Callable[..., Tensor]:
    """`function` compiled for fixed shapes; compiled once for all modules that are built alike."""
    mode = "max-autotune-no-cudagraphs" if autotune else None
    return compile_for_fixed_shapes(function, fullgraph=True, mode=mode)


def run_block(
    block: Block,
    x: Tensor,
    signals: Sequence[Tensor],
    text: TextMemory,
    windows: WindowContext,
    kernel: AttentionKernel,
) -> Tensor:
    """:meth:`Block.transform`, in which attention tries `kernel` first.

    The choice is made in here because compiled code is bound to the kernel that it was traced with.
    """
    if kernel == "auto":
        return block.transform(x, signals, text, windows)
    with sdpa_kernel(PREFERENCES[kernel], set_priority=True):
        return block.transform(x, signals, text, windows)


def run_output(model: StreamDiT, x: Tensor, signals: Sequence[Tensor], latents: Tensor) -> Tensor:
    """Velocity in the shape of `latents`, from tokens `x` and the output layer's signals."""
    shift, scale = signals
    return model.unembed(model.output.project(x, shift, scale), latents)


class StepGraph:
    """A function of latents, captured as a CUDA graph at its first call and replayed since.

    Whatever else the function reads must stay where it is in memory. The function is given at every
    call and not kept: its owner holds this graph, and a circle of the two would hold the memory of
    a stream that is over until Python looks for circles.
    """

    WARM_UP = 3
    """Calls before the capture, in which kernels are tuned and libraries set up."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._latents = torch.zeros(shape, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self, function: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        """The function of `latents`, in a buffer that the next call overwrites.

        Args:
            function: the same at every call.
            latents: of the shape given before.
        """
        # Capture and replay happen on the current device, which need not be the one of the tensors.
        with torch.cuda.device(self._latents.device):
            self._latents.copy_(latents)
            if self._graph is None:
                self._graph = self._capture(function)
            self._graph.replay()
        assert self._result is not None
        return self._result

    def _capture(self, function: Callable[[Tensor], Tensor]) -> torch.cuda.CUDAGraph:
        current, side = torch.cuda.current_stream(), self._own_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                function(self._latents)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for captures lies on whichever device was captured on first.
        # Other threads, such as one that encodes a prompt, may use the device meanwhile.
        try:
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._result = function(self._latents)
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
        return graph

    def _own_stream(self) -> torch.cuda.Stream:
        """A CUDA stream on which no other living graph was captured.

        cuBLAS keeps its workspace by stream, the captured kernels use that workspace, and it is
        freed with the first graph that was captured on the stream. PyTorch deals its streams out
        again and again; of those with a high priority nothing else here takes any.
        """
        if len(_STREAMS_IN_USE) >= POOL_STREAMS:
            gc.collect()  # streams that are over may lie in circles
        for _ in range(POOL_STREAMS):
            side = torch.cuda.Stream(priority=-1)
            key = (side.device_index, side.cuda_stream)
            if key not in _STREAMS_IN_USE:
                _STREAMS_IN_USE.add(key)
                weakref.finalize(self, _STREAMS_IN_USE.discard, key)
                return side
        raise UserError(
            f"{POOL_STREAMS} streams of this process replay CUDA graphs already; close some of "
            "them, or leave out cuda_graph for further ones"
        )


def check_supported(config: FastConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what `device`, or weights in `dtype`, cannot do.

    Raises:
        UserError: naming the switch to turn off.
    """
    if config.autotune and not config.compile:
        raise UserError("autotune tunes what is compiled; set compile: true, or autotune: false")
    if config.cuda_graph and not config.text_memory:
        raise UserError(
            "cuda_graph replays a step whose text memories stay in place; set text_memory: true, "
            "or cuda_graph: false"
        )
    if config.cuda_graph and device.type != "cuda":
        raise UserError(
            f"cuda_graph needs a CUDA device, but the stream runs on {device.type}; leave it out"
        )
    if config.float8 and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FLOAT8_CAPABILITY:
            raise UserError(
                f"float8 needs a GPU of compute capability 8.9 or more, but this one has "
                f"{capability[0]}.{capability[1]}; leave it out"
            )
        if dtype != torch.bfloat16:
            raise UserError(
                f"float8 replaces bfloat16 layers, but the model is in {dtype}; load it with "
                "dtype=torch.bfloat16, or leave float8 out"
            )
