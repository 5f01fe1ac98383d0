"""Sizes of published models that a configuration names but does not hold."""

from __future__ import annotations

from dataclasses import dataclass

from streamdit.config import TextEncoderConfig


@dataclass(frozen=True)
class PublishedEncoder:
    """A text encoder that models of this project are made for.

    Attributes:
        config: how to load it.
        parameters: of the half that encodes text.
    """

    config: TextEncoderConfig
    parameters: int


# max_tokens is what captions need at most, where the model itself sets no bound.
TEXT_ENCODERS = {
    encoder.config.name: encoder
    for encoder in (
        PublishedEncoder(
            TextEncoderConfig(
                name="ul2", kind="t5", source="google/ul2", width=4096, max_tokens=128
            ),
            8_721_797_632,
        ),
        PublishedEncoder(
            TextEncoderConfig(
                name="byt5", kind="t5", source="google/byt5-small", width=1472, max_tokens=256
            ),
            217_657_472,
        ),
        PublishedEncoder(
            TextEncoderConfig(
                name="metaclip",
                kind="open_clip",
                source="ViT-bigG-14-quickgelu",
                pretrained="metaclip_fullcc",
                width=1280,
                max_tokens=77,
            ),
            693_021_440,
        ),
        PublishedEncoder(
            TextEncoderConfig(
                name="umt5", kind="t5", source="google/umt5-xxl", width=4096, max_tokens=512
            ),
            5_680_910_336,
        ),
    )
}
"""The paper's three (arXiv:2507.03745v4, Sec. 4.1) in their public form, and Wan's."""

WAN_AUTOENCODERS = {16: 126_892_531, 48: 704_688_668}
"""Parameters of Wan 2.1's and Wan 2.2 TI2V's autoencoder, by their latent channels."""


def text_encoder_parameters(name: str, width: int) -> int | None:
    """Parameters of a text encoder by the name of its states; None if it is not known."""
    if name == "bytes":
        return 0
    known = TEXT_ENCODERS.get(name)
    return known.parameters if known is not None and known.config.width == width else None
