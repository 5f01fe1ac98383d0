"""3D windows over the token grid, regular and shifted (arXiv:2507.03745v4, Fig. 4).

Shifted windows wrap around at the ends of an axis, which rolling the grid does exactly, so
attention inside a window never needs a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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

    @classmethod
    def of(cls, grid: Triple, window: Triple, shifted: bool) -> Windowing:
        """Regular windows, or windows shifted by half their size on every axis.

        An axis that one window spans needs no shift: all its tokens attend to each other anyway.
        """
        assert all(g % w == 0 for g, w in zip(grid, window, strict=True))
        shift = tuple(w // 2 if shifted and w < g else 0 for g, w in zip(grid, window, strict=True))
        return cls(grid, window, (shift[0], shift[1], shift[2]))

    @property
    def count(self) -> int:
        """Number of windows."""
        return (
            (self.grid[0] // self.window[0])
            * (self.grid[1] // self.window[1])
            * (self.grid[2] // self.window[2])
        )

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
