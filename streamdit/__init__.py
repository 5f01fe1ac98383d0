"""StreamDiT: real-time streaming text-to-video generation (arXiv:2507.03745v4).

import streamdit

stream = streamdit.load("models:/streamdit@production").stream("a red circle moving left")
for chunk in stream:
show(chunk.frames)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamdit.denoiser import Denoiser
    from streamdit.errors import UserError
    from streamdit.loading import StreamingModel, load
    from streamdit.model import StreamDiT
    from streamdit.partition import PartitionMixture, PartitionScheme
    from streamdit.stream import Stream, StreamChunk

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "PartitionMixture",
    "PartitionScheme",
    "Stream",
    "StreamChunk",
    "StreamDiT",
    "StreamingModel",
    "UserError",
    "__version__",
    "load",
]

# Loaded when first asked for: processes that only decode video or read a configuration import
# `streamdit.config` without paying for PyTorch.
_HOMES = {
    "Denoiser": "streamdit.denoiser",
    "PartitionMixture": "streamdit.partition",
    "PartitionScheme": "streamdit.partition",
    "Stream": "streamdit.stream",
    "StreamChunk": "streamdit.stream",
    "StreamDiT": "streamdit.model",
    "StreamingModel": "streamdit.loading",
    "UserError": "streamdit.errors",
    "load": "streamdit.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamdit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
