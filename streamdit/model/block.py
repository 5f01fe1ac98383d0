"""One transformer block (arXiv:2507.03745v4, Fig. 3).

Scale/shift, window self-attention, gate; cross-attention to text; scale/shift, feed-forward,
gate. Tokens travel as `[b, f, n, d]`: frames and patches apart, since time varies by frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from streamdit.config import DiTConfig
from streamdit.model.attention import attention
from streamdit.model.modulation import (
    Float32LayerNorm,
    Float32RMSNorm,
    build_modulation,
    modulate,
)
from streamdit.model.position import rotate
from streamdit.model.text import TextContext
from streamdit.model.windows import Windowing


@dataclass(frozen=True)
class TextMemory:
    """What a block's text attention looks at; the same for as long as a prompt is in force.

    Attributes:
        key: `[b, heads, l, d / heads]`.
        value: same shape.
        mask: as in :class:`TextContext`.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None

    def attend(self, query: Tensor) -> Tensor:
        """Attention of `query [b, heads, l, d / heads]` to the text, same shape."""
        return attention(query, self.key, self.value, self.mask)


@dataclass(frozen=True)
class WindowContext:
    """How a layer cuts the grid, and the rotary cosines and sines in that window order."""

    windowing: Windowing
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, windowing: Windowing, angles: Tensor) -> WindowContext:
        """Context of a layer, from the angles of the whole grid `[F, H, W, head_width / 2]`."""
        cut = windowing.split(angles[None])
        return cls(windowing, cut.cos(), cut.sin())


class Heads(nn.Module):
    """Queries or keys: split into heads and normalised as the configuration says."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.joint_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if config.qk_norm == "across_heads":
            self.joint_norm = Float32RMSNorm(config.width, eps=1e-6)
        elif config.qk_norm == "per_head":
            self.norm = Float32RMSNorm(config.width // config.heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, l, d]` to `[n, heads, l, d / heads]`."""
        heads: Tensor = self.norm(self.joint_norm(x).unflatten(-1, (self.heads, -1)))
        return heads.transpose(1, 2)


class WindowAttention(nn.Module):
    """Self-attention inside 3D windows, without a mask."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.query = Heads(config)
        self.key = Heads(config)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, context: WindowContext) -> Tensor:
        """`[b, f, n, d]` to `[b, f, n, d]`; tokens see their own window only.

        Rotary angles belong to a token's place in the whole grid and were cut into windows like
        the tokens, which is the same as rotating before the windows are formed and shifted.
        """
        batch = x.shape[0]
        grid = x.unflatten(2, context.windowing.grid[1:])
        windows = context.windowing.split(grid)
        query, key, value = self.qkv(windows).chunk(3, dim=-1)
        attended = context.windowing.attend(
            rotate(self.query(query), context.cos, context.sin),
            rotate(self.key(key), context.cos, context.sin),
            value.unflatten(-1, (self.heads, -1)).transpose(1, 2),
        )
        windows = self.output(attended.transpose(1, 2).flatten(2))
        return context.windowing.merge(windows, batch).flatten(2, 3)


class CrossAttention(nn.Module):
    """Attention from video tokens to text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_query = nn.Linear(config.width, config.width)
        self.to_key_value = nn.Linear(config.width, 2 * config.width)
        self.query = Heads(config)
        self.key = Heads(config)
        self.output = nn.Linear(config.width, config.width)

    def remember(self, text: TextContext) -> TextMemory:
        """Keys and values of projected text."""
        key, value = self.to_key_value(text.values).chunk(2, dim=-1)
        value = value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return TextMemory(self.key(key), value, text.mask)

    def forward(self, x: Tensor, text: TextMemory) -> Tensor:
        """`[b, f, n, d]` to `[b, f, n, d]`."""
        query = self.query(self.to_query(x.flatten(1, 2)))
        output: Tensor = self.output(text.attend(query).transpose(1, 2).flatten(2))
        return output.unflatten(1, x.shape[1:3])


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between them."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(
            nn.Linear(config.width, config.ffn_width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_width, config.width),
        )


class Block(nn.Module):
    """Transformer block with one scale, shift and gate per frame and branch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = build_modulation(config, signals=6)
        self.attention_norm = Float32LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.attention = WindowAttention(config)
        self.text_norm = Float32LayerNorm(config.width, eps=1e-6)
        self.text_attention = CrossAttention(config)
        self.ffn_norm = Float32LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        shared: Tensor | None,
        text: TextContext,
        windows: WindowContext,
    ) -> Tensor:
        """Tokens `x [b, f, n, d]`, time embedding `[b, f, d]`, shared modulation or None."""
        signals = self.modulation(time, shared)
        return self.transform(x, signals, self.text_attention.remember(text), windows)

    def transform(
        self, x: Tensor, signals: Sequence[Tensor], text: TextMemory, windows: WindowContext
    ) -> Tensor:
        """The block on tokens `x [b, f, n, d]`, given all that does not depend on them.

        `signals` are shift, scale and gate of the attention, then of the feed-forward network,
        each broadcasting over `[b, f, n, d]`. They and `text` hold for many steps of a stream.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = signals
        dtype = x.dtype
        branch = modulate(self.attention_norm(x), shift_a, scale_a).to(dtype)
        x = (x + gate_a * self.attention(branch, windows)).to(dtype)
        x = x + self.text_attention(self.text_norm(x).to(dtype), text)
        branch = modulate(self.ffn_norm(x), shift_f, scale_f).to(dtype)
        return (x + gate_f * self.ffn(branch)).to(dtype)
