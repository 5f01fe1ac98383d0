"""Loading a model of open_clip, with errors that name the setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamdit.errors import UserError


@dataclass(frozen=True)
class OpenClipModel:
    """A model in evaluation mode with what goes in front of it."""

    network: Any
    """The module."""
    preprocess: Any
    """From a PIL image to a tensor `[3, H, W]`."""
    tokenizer: Any
    """From texts to tokens `[b, l]`."""


def load_open_clip(
    setting: str, model: str, pretrained: str | None, device: str = "cpu"
) -> OpenClipModel:
    """Load a model and its weights.

    Args:
        setting: section of the configuration that names it, for errors.
        model: open_clip model name, `hf-hub:org/name` or `local-dir:/path`.
        pretrained: weights tag or checkpoint path of a named model.
        device: torch device.

    Raises:
        UserError: if it cannot be loaded.
    """
    import open_clip

    named = ":" not in model
    if named and pretrained is None:
        raise UserError(
            f"{setting}.model {model!r} has no weights: set {setting}.pretrained to a tag or a "
            "checkpoint file"
        )
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=pretrained if named else None, device=device
        )
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{setting}.model {model!r} cannot be loaded ({reason}): check {setting}.model and "
            f"{setting}.pretrained"
        ) from None
    return OpenClipModel(network.eval(), preprocess, tokenizer)
