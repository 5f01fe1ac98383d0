"""The text encoder without weights."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from streamdit.config import TextEncoderConfig
from streamdit.text import TextEncoder, TextStates, build_text_encoder, build_text_encoders
from streamdit.text.hashed_bytes import BEGIN, ngrams, tokenise, word_vector

PROMPT = "a red circle moving left over a blue background"


def encoder(width: int = 64, max_tokens: int = 32) -> TextEncoder:
    return build_text_encoder(
        TextEncoderConfig(name="bytes", kind="bytes", width=width, max_tokens=max_tokens)
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("A Red circle", [b"a", b"red", b"circle"]),
        ("24fps, snake_case!", [b"24fps", b",", b"snake", b"_", b"case", b"!"]),
        ("cafe\u0301", ["café".encode()]),  # decomposed accent, composed by NFC
        ("ÉTÉ", ["été".encode()]),
        ("a" * 40, [b"a" * 16, b"a" * 16, b"a" * 8]),
        ("\t \n", []),
    ],
)
def test_text_is_lower_case_words_and_marks_after_a_begin_token(text: str, words: list[bytes]):
    assert tokenise(text) == [BEGIN, *words]


def test_ngrams_are_all_runs_of_one_to_four_bytes_with_boundaries():
    assert ngrams(b"ab") == [
        b"<", b"a", b"b", b">", b"<a", b"ab", b"b>", b"<ab", b"ab>", b"<ab>", b"\x00<ab>",
    ]  # fmt: skip


def test_states_have_about_unit_variance_per_element():
    values, mask = encoder(width=512).encode([PROMPT])
    assert mask.all()
    assert values.square().mean(dim=2).tolist() == [pytest.approx([1.0] * 10, abs=0.2)]


def test_the_empty_prompt_has_one_token():
    values, mask = encoder().encode([""])
    assert values.shape == (1, 1, 64)
    assert mask.tolist() == [[True]]


def test_a_prompt_does_not_depend_on_its_batch_and_padding_is_zero():
    together, mask = encoder().encode(["", PROMPT, "two words"])
    assert mask.sum(dim=1).tolist() == [1, 10, 3]
    assert (together[~mask] == 0).all()
    for row, prompt in enumerate(["", PROMPT, "two words"]):
        alone, _ = encoder().encode([prompt])
        assert torch.equal(together[row][mask[row]], alone[0])


def test_long_text_is_cut_to_max_tokens():
    values, mask = encoder(max_tokens=4).encode([PROMPT])
    whole, _ = encoder().encode([PROMPT])
    assert mask.sum() == 4
    assert torch.equal(values, whole[:, :4])


def test_similar_spellings_are_nearer_than_different_words():
    cat, cats, dog = (torch.from_numpy(word_vector(w, 512)) for w in (b"cat", b"cats", b"dog"))
    assert cosine(cat, cats) > 0.4
    assert cosine(cat, cats) > cosine(cat, dog) + 0.3


def test_the_same_word_differs_by_place():
    values, _ = encoder().encode(["red red"])
    assert not torch.equal(values[0, 1], values[0, 2])
    assert cosine(values[0, 1], values[0, 2]) > 0.7


@pytest.mark.parametrize("width", [1, 7, 64, 300])
def test_any_width_is_served(width: int):
    values, _ = encoder(width=width).encode(["word"])
    assert values.shape == (1, 2, width)
    assert values.isfinite().all()


def test_states_are_the_same_in_another_process():
    """Python's own hash() differs from process to process; this one must not."""
    program = (
        "import hashlib; from streamdit.text.hashed_bytes import word_vector; "
        "print(hashlib.sha256(word_vector('été'.encode(), 48).tobytes()).hexdigest())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.strip()
    here = hashlib.sha256(word_vector("été".encode(), 48).tobytes()).hexdigest()
    assert output == here == GOLDEN


GOLDEN = "b4ee88546cbbd0318fa029c7b4084beec5df5af1d15fb1399591d5714ba4a94a"
"""Written down once: datasets and models rely on these states never changing."""


def test_encoders_are_built_in_order_and_run_together():
    configs = [
        TextEncoderConfig(name=name, kind="bytes", width=width, max_tokens=8)
        for name, width in (("small", 8), ("large", 16))
    ]
    encoders = build_text_encoders(configs)
    assert encoders.configs == tuple(configs)
    states = encoders.encode(["a", "b c"])
    assert isinstance(states, TextStates)
    assert states["small"][0].shape == (2, 3, 8)
    assert states["large"][0].shape == (2, 3, 16)
