"""3D windows over the token grid, regular and shifted (arXiv:2507.03745v4, Fig. 4).

Shifted windows wrap around at the ends of an axis, which rolling the grid does exactly, so
attention inside a window never needs a mask. Where windows must not wrap around in time, the ones
that would are attended to in two parts, which needs no mask either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamdit.model.attention import attention

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Windowing:
    """One way to cut a token grid `[F, H, W]` into windows `[Fw, Hw, Ww]`.

    Attributes:
        grid: tokens along (frames, rows, columns).
        window: window size along the same axes; divides the grid.
        shift: by how much the windows are displaced along each axis.
    """

    grid: Triple
    window: Triple
    shift: Triple

    @staticmethod
    def of(grid: Triple, window: Triple, shifted: bool, temporal_wrap: bool = True) -> Windowing:
        """Regular windows, or windows shifted by half their size on every axis.

        An axis that one window spans needs no shift: all its tokens attend to each other anyway.
        """
        assert all(g % w == 0 for g, w in zip(grid, window, strict=True))
        shift = tuple(w // 2 if shifted and w < g else 0 for g, w in zip(grid, window, strict=True))
        cut = shift[0] > 0 and not temporal_wrap
        return (CutWindowing if cut else Windowing)(grid, window, (shift[0], shift[1], shift[2]))

    @property
    def count(self) -> int:
        """Number of windows."""
        return (
            (self.grid[0] // self.window[0])
            * (self.grid[1] // self.window[1])
            * (self.grid[2] // self.window[2])
        )

    @property
    def window_tokens(self) -> int:
        """Tokens of one window."""
        return self.window[0] * self.window[1] * self.window[2]

    @property
    def pairs(self) -> int:
        """Pairs of query and key that attend to each other, over all windows."""
        return self.count * self.window_tokens**2

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of each window to itself; all `[b * windows, heads, l, d]`."""
        return attention(query, key, value)

    def split(self, tokens: Tensor) -> Tensor:
        """`[b, F, H, W, d]` to `[b * windows, Fw * Hw * Ww, d]`."""
        b, f, h, w, d = tokens.shape
        fw, hw, ww = self.window
        if any(self.shift):
            tokens = tokens.roll([-offset for offset in self.shift], dims=(1, 2, 3))
        tokens = tokens.view(b, f // fw, fw, h // hw, hw, w // ww, ww, d)
        return tokens.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, fw * hw * ww, d)

    def merge(self, windows: Tensor, batch: int) -> Tensor:
        """The inverse of :meth:`split`: back to `[b, F, H, W, d]`."""
        f, h, w = self.grid
        fw, hw, ww = self.window
        d = windows.shape[-1]
        tokens = windows.view(batch, f // fw, h // hw, w // ww, fw, hw, ww, d)
        tokens = tokens.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, f, h, w, d)
        if any(self.shift):
            tokens = tokens.roll(list(self.shift), dims=(1, 2, 3))
        return tokens


@dataclass(frozen=True)
class CutWindowing(Windowing):
    """Shifted windows that do not wrap around in time.

    After rolling, the last windows in time hold the end of the buffer and then its start. Those two
    parts are attended to apart, as the shorter windows that they are.
    """

    @property
    def pairs(self) -> int:
        """Pairs of query and key that attend to each other, over all windows."""
        whole, cut = self._rows
        return whole * self.window_tokens**2 + cut * sum(part**2 for part in self._parts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of each window to itself, of those at the cut in two parts."""
        rows = [
            x.unflatten(0, (-1, self.count)).split(self._rows, dim=1) for x in (query, key, value)
        ]
        whole = attention(*(x.flatten(0, 1) for x, _ in rows))
        parts = zip(*(x.flatten(0, 1).split(self._parts, dim=2) for _, x in rows), strict=True)
        cut = torch.cat([attention(*part) for part in parts], dim=2)
        batch = query.shape[0] // self.count
        attended = [x.unflatten(0, (batch, -1)) for x in (whole, cut)]
        return torch.cat(attended, dim=1).flatten(0, 1)

    @property
    def _rows(self) -> list[int]:
        """Windows that are whole, and those at the cut, which come last."""
        cut = self.count // (self.grid[0] // self.window[0])
        return [self.count - cut, cut]

    @property
    def _parts(self) -> list[int]:
        """Tokens before and after the cut in a window that has one."""
        frame = self.window[1] * self.window[2]
        return [(self.window[0] - self.shift[0]) * frame, self.shift[0] * frame]
