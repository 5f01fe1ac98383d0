"""StreamDiT: real-time streaming text-to-video generation (arXiv:2507.03745v4).

import streamdit

stream = streamdit.load("models:/streamdit@production").stream("a red circle moving left")
for chunk in stream:
    show(chunk.frames)
"""

from streamdit.errors import UserError
from streamdit.io import StreamingModel, load
from streamdit.model import StreamDiT
from streamdit.partition import PartitionMixture, PartitionScheme
from streamdit.stream import Denoiser, Stream, StreamChunk

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
