"""From the configuration of text encoders to the encoders."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from streamdit.config import TextEncoderConfig
from streamdit.text.base import TextEncoder, TextEncoders
from streamdit.text.hashed_bytes import HashedBytesEncoder
from streamdit.text.pretrained import OpenClipEncoder, T5Encoder


def build_text_encoder(
    config: TextEncoderConfig, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Build one text encoder, with its weights, on `device`.

    Raises:
        UserError: if its model cannot be loaded or does not have the configured width.
    """
    match config.kind:
        case "bytes":
            return HashedBytesEncoder(config, device)
        case "t5":
            return T5Encoder(config, device)
        case "open_clip":
            return OpenClipEncoder(config, device)


def build_text_encoders(
    configs: Iterable[TextEncoderConfig], device: torch.device | str = "cpu"
) -> TextEncoders:
    """Build all encoders of a model on `device`, in the order of `configs`.

    Raises:
        UserError: as :func:`build_text_encoder`.
    """
    return TextEncoders(build_text_encoder(config, device) for config in configs)
