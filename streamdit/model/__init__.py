"""The diffusion transformer of StreamDiT (arXiv:2507.03745v4, Sec. 3.3)."""

from streamdit.model.dit import StreamDiT, build_dit

__all__ = ["StreamDiT", "build_dit"]
