"""StreamDiT: adaLN diffusion transformer with per-frame time and 3D window attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamdit.config import DiTConfig
from streamdit.model.block import Block, WindowContext
from streamdit.model.compiling import compile_for_any_shape
from streamdit.model.memory import recomputed_blocks
from streamdit.model.modulation import (
    Float32LayerNorm,
    Float32Linear,
    SingleModulation,
    TimeEmbedding,
    ZeroModulation,
    build_output_modulation,
    modulate,
)
from streamdit.model.position import rotary_angles, sinusoidal_positions
from streamdit.model.text import TextContext, TextProjection
from streamdit.model.windows import Windowing
from streamdit.text.base import TextStates


class OutputLayer(nn.Module):
    """Modulated norm and projection from tokens to the voxels of their patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        voxels = config.patch[0] * config.patch[1] * config.patch[2]
        self.modulation = build_output_modulation(config, signals=2)
        self.norm = Float32LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.projection = nn.Linear(config.width, voxels * config.latent_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`[b, f, n, d]` to `[b, f, n, voxels * C]`."""
        return self.project(x, *self.modulation(time, None))

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The layer, given its signals, each broadcasting over `[b, f, n, d]`."""
        output: Tensor = self.projection(modulate(self.norm(x), shift, scale).to(x.dtype))
        return output


def apply_block(block: nn.Module, *arguments: Any) -> Tensor:
    """A block on its arguments."""
    output: Tensor = block(*arguments)
    return output


@functools.cache
def compiled_block() -> Callable[..., Tensor]:
    """The same compiled: once for all blocks alike, of regular and of shifted windows."""
    return compile_for_any_shape(apply_block)


class StreamDiT(nn.Module):
    """Velocity network of buffered flow matching (arXiv:2507.03745v4, Sec. 3.3).

    Args:
        config: shape of the network. Windows are chosen per latent grid, and no weight depends on
            them.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: bool | int = False
        """Blocks whose activations are recomputed in the backward pass: all, none or the first
        so many."""
        self.compile_blocks = False
        """Whether blocks run compiled, with and without gradients."""
        voxels = config.patch[0] * config.patch[1] * config.patch[2]
        self.patch_embedding = nn.Linear(voxels * config.latent_channels, config.width)
        self.time_embedding = TimeEmbedding(config)
        self.shared_modulation = (
            Float32Linear(config.width, 6 * config.width) if config.modulation == "single" else None
        )
        self.text = TextProjection(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output = OutputLayer(config)

    def initialise(self, generator: torch.Generator | None = None) -> StreamDiT:
        """Draw fresh weights: Xavier-uniform matrices, zero biases, gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ZeroModulation | SingleModulation):
                module.initialise(generator)
        nn.init.zeros_(self.output.projection.weight)
        return self

    def project_text(self, text: TextStates) -> TextContext:
        """Project and concatenate all encoders' states; may be kept for as long as a prompt is."""
        context: TextContext = self.text(text)
        return context

    def forward(self, latents: Tensor, tau: Tensor, text: TextStates) -> Tensor:
        """Predict the velocity of every latent frame.

        Args:
            latents: normalised, noised latents `[b, f, C, h, w]`.
            tau: time of each frame `[b, f]`, 0 = noise, 1 = data.
            text: states of b prompts.

        Returns:
            Velocity `[b, f, C, h, w]` in the dtype of `latents`.

        Raises:
            ValueError: if the grid fits no bucket of the configuration.
        """
        return self.denoise(latents, tau, self.project_text(text))

    def denoise(self, latents: Tensor, tau: Tensor, text: TextContext) -> Tensor:
        """Like :meth:`forward`, on text that is projected already."""
        contexts = self.window_contexts(latents.shape, latents.device)
        time, shared = self.embed_time(tau)
        x = self.embed_latents(latents)
        recomputed = recomputed_blocks(self.activation_checkpointing, len(self.blocks))
        run = compiled_block() if self.compile_blocks else apply_block
        for index, block in enumerate(self.blocks):
            arguments = (block, x, time, shared, text, contexts[index % 2])
            if index < recomputed and torch.is_grad_enabled():
                x = checkpoint(run, *arguments, use_reentrant=False)
            else:
                x = run(*arguments)
        return self.unembed(self.output(x, time), latents)

    def embed_time(self, tau: Tensor) -> tuple[Tensor, Tensor | None]:
        """Time embedding `[b, f, width]`, and the modulation that all blocks share, if any."""
        time = self.time_embedding(tau)
        if self.shared_modulation is None:
            return time, None
        return time, self.shared_modulation(nn.functional.silu(time))

    def window_contexts(self, shape: Sequence[int], device: torch.device) -> list[WindowContext]:
        """Contexts of even and odd blocks, for latents of `shape` `[b, f, C, h, w]`."""
        config = self.config
        grid = self._token_grid(shape)
        window = config.window_for(shape[1], shape[3], shape[4])
        angles = rotary_angles(grid, config.width // config.heads, config.rope_theta, device)
        return [
            WindowContext.of(Windowing.of(grid, window, shifted, config.temporal_wrap), angles)
            for shifted in (False, True)
        ]

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Latents `[b, f, C, h, w]` to tokens `[b, f, n, width]` in the model's precision."""
        weight = self.patch_embedding.weight
        x: Tensor = self.patch_embedding(self._patchify(latents.to(weight.dtype)))
        if self.config.absolute_position:
            grid = self._token_grid(latents.shape)
            x = x + sinusoidal_positions(grid, self.config.width, x.device).to(x.dtype)
        return x

    def unembed(self, voxels: Tensor, latents: Tensor) -> Tensor:
        """Voxels per token `[b, f, n, voxels * C]` to the shape and dtype of `latents`."""
        return self._unpatchify(voxels, self._token_grid(latents.shape)).to(latents.dtype)

    def _token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        _, frames, _, height, width = shape
        _, rows, columns = self.config.patch
        return (frames, height // rows, width // columns)

    def _patchify(self, latents: Tensor) -> Tensor:
        """`[b, f, C, h, w]` to tokens `[b, f, n, C * ph * pw]`."""
        _, ph, pw = self.config.patch
        b, f, c, h, w = latents.shape
        patches = latents.reshape(b, f, c, h // ph, ph, w // pw, pw)
        return patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f, -1, c * ph * pw)

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The inverse of :meth:`_patchify`."""
        _, ph, pw = self.config.patch
        f, h, w = grid
        patches = tokens.view(tokens.shape[0], f, h, w, self.config.latent_channels, ph, pw)
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(
            tokens.shape[0], f, self.config.latent_channels, h * ph, w * pw
        )


def build_dit(config: DiTConfig, seed: int = 0) -> StreamDiT:
    """A freshly initialised model, the same for the same seed."""
    return StreamDiT(config).initialise(torch.Generator().manual_seed(seed))
