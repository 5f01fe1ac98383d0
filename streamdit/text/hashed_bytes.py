"""Text states without weights: words as sums of hashed byte n-grams, in the manner of fastText.

Hashing and sums are done in integers, so the states are the same on every machine and for every
Python version; words of similar spelling get similar vectors.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from streamdit.config import TextEncoderConfig

MAX_WORD_BYTES = 16
MAX_NGRAM = 4
POSITION_SHARE = 0.2
"""Part of a state's variance that its position makes up."""

# Runs of letters and digits are words; any other mark is a token of its own.
TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")
BEGIN = b"\x02begin"


class HashedBytesEncoder:
    """Encoder of kind `bytes`; see :class:`streamdit.text.TextEncoder`."""

    def __init__(self, config: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._positions = math.sqrt(POSITION_SHARE) * sinusoids(config.max_tokens, config.width)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Values `[b, l, width]` float32 of about unit variance, and mask `[b, l]`."""
        tokens = [tokenise(prompt)[: self.config.max_tokens] for prompt in prompts]
        length = max(map(len, tokens))
        values = np.zeros((len(prompts), length, self.config.width), np.float32)
        mask = np.zeros((len(prompts), length), bool)
        for row, words in enumerate(tokens):
            values[row, : len(words)] = self._states(words)
            mask[row, : len(words)] = True
        return torch.from_numpy(values).to(self.device), torch.from_numpy(mask).to(self.device)

    def _states(self, words: list[bytes]) -> np.ndarray:
        vectors = np.stack([word_vector(word, self.config.width) for word in words])
        share = math.sqrt(1.0 - POSITION_SHARE)
        return share * vectors + self._positions[: len(words)]


def tokenise(text: str) -> list[bytes]:
    """A begin token, then the words of `text` (lower case, NFC) in UTF-8.

    Words longer than `MAX_WORD_BYTES` are split.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    words = [word.encode("utf-8", "replace") for word in TOKEN.findall(text)]
    pieces = [
        word[start : start + MAX_WORD_BYTES]
        for word in words
        for start in range(0, len(word), MAX_WORD_BYTES)
    ]
    return [BEGIN, *pieces]


@lru_cache(maxsize=16_384)
def word_vector(word: bytes, width: int) -> np.ndarray:
    """Sum of the word's n-gram vectors `[width]` float64, scaled to unit variance per element."""
    total = np.sum([ngram_vector(ngram, width) for ngram in ngrams(word)], axis=0)
    return total * math.sqrt(width / int(np.dot(total, total)))


def ngrams(word: bytes) -> list[bytes]:
    """Byte n-grams of 1 to `MAX_NGRAM` bytes of `<word>`, and the whole marked word.

    The whole word is there so that words of the same n-grams still differ.
    """
    marked = b"<" + word + b">"
    parts = [
        marked[start : start + size]
        for size in range(1, MAX_NGRAM + 1)
        for start in range(len(marked) - size + 1)
    ]
    return [*parts, b"\x00" + marked]


@lru_cache(maxsize=65_536)
def ngram_vector(ngram: bytes, width: int) -> np.ndarray:
    """Near-Gaussian int64 vector `[width]` of mean 0 that only the n-gram decides.

    An element is the sum of four 16-bit uniform numbers (BLAKE2b in counter mode): integers, so
    that sums of vectors are exact, which they are not for logarithms and cosines.
    """
    digests = [
        hashlib.blake2b(ngram, digest_size=64, salt=counter.to_bytes(16, "little")).digest()
        for counter in range(-(-width // 8))
    ]
    uniform = np.frombuffer(b"".join(digests), dtype="<u2").astype(np.int64).reshape(-1, 4)
    # Twice the sum, because its mean is 2 * 65535 and half of an element's would be a fraction.
    return (2 * uniform.sum(axis=1) - 4 * 65_535)[:width]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Sinusoidal positions `[length, width]` of unit variance (Vaswani et al. 2017, Sec. 3.5)."""
    pairs = (width + 1) // 2
    frequencies = 10_000.0 ** (-np.arange(pairs) / pairs)
    angles = np.arange(length)[:, None] * frequencies
    return math.sqrt(2.0) * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]
