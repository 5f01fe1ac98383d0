"""Prompts to text states: the contract, and encoders that fulfil it."""

from streamdit.text.base import TextEncoder, TextEncoders, TextStates
from streamdit.text.encoders import build_text_encoder, build_text_encoders

__all__ = [
    "TextEncoder",
    "TextEncoders",
    "TextStates",
    "build_text_encoder",
    "build_text_encoders",
]
