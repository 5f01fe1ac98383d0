"""Text encoders with weights: tiny random models of the real kinds, saved by the test."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import (
    BertConfig,
    ByT5Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from streamdit.config import TextEncoderConfig
from streamdit.errors import UserError
from streamdit.text import TextEncoder, build_text_encoder

PROMPTS = ["a red circle", "", "ein grüner Kreis bewegt sich"]
SMALL = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module", params=["t5", "umt5"])
def t5_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "t5":
        T5EncoderModel(T5Config(**SMALL)).save_pretrained(path)
        ByT5Tokenizer().save_pretrained(path)
    else:
        UMT5EncoderModel(UMT5Config(**SMALL)).save_pretrained(path)
        pieces = ["<pad>", "</s>", "<unk>", *("▁abcdefghijklmnopqrstuvwxyzü")]
        T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces]).save_pretrained(path)
    return path


def t5(path: Path, width: int = 16, max_tokens: int = 64) -> TextEncoder:
    return build_text_encoder(
        TextEncoderConfig(
            name="byt5", kind="t5", source=str(path), width=width, max_tokens=max_tokens
        )
    )


def test_t5_states_are_those_of_the_model_on_the_prompt_alone(t5_directory: Path):
    encoder = t5(t5_directory)
    values, mask = encoder.encode(PROMPTS)
    assert values.dtype == torch.float32
    assert (values[~mask] == 0).all()
    assert mask.sum(dim=1)[1] == 1  # the empty prompt is its end token
    for row, prompt in enumerate(PROMPTS):
        ids = encoder.tokenizer(prompt, return_tensors="pt").input_ids
        assert mask[row].tolist() == [i < ids.shape[1] for i in range(mask.shape[1])]
        expected = encoder.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(values[row][mask[row]], expected, rtol=1e-4, atol=1e-5)


def test_t5_cuts_long_text_and_keeps_the_end_token(t5_directory: Path):
    encoder = t5(t5_directory, max_tokens=5)
    values, mask = encoder.encode(["a red circle"])
    assert mask.sum() == 5
    whole = encoder.tokenizer("a red circle").input_ids
    ids = torch.tensor([[*whole[:4], whole[-1]]])
    expected = encoder.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_byt5_tokens_are_bytes(tmp_path: Path):
    T5EncoderModel(T5Config(**SMALL)).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    _, mask = t5(tmp_path).encode(["ü!"])
    assert mask.sum() == 4  # two bytes, one byte, end of sequence


def test_t5_of_another_width_is_refused_with_both_numbers(t5_directory: Path):
    with pytest.raises(UserError, match=r"width is 24 .* has 16; set width to 16"):
        t5(t5_directory, width=24)


def test_a_missing_t5_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="could not be loaded") as raised:
        t5(tmp_path)
    assert "\n" not in str(raised.value)


def test_another_family_is_refused(tmp_path: Path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model"):
        t5(tmp_path)


CLIP_CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture(scope="module", params=[False, True], ids=["clip", "custom-text"])
def clip_names(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """Model name and checkpoint path; CLIP and CustomTextCLIP keep the text tower differently."""
    folder = tmp_path_factory.mktemp("clip")
    name = f"tiny-streamdit-{request.param}"
    config = CLIP_CONFIG | {"custom_text": request.param}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    checkpoint = folder / "weights.pt"
    torch.save(open_clip.create_model(name).state_dict(), checkpoint)
    return name, str(checkpoint)


def clip(names: tuple[str, str], width: int = 16, max_tokens: int = 77) -> TextEncoder:
    return build_text_encoder(
        TextEncoderConfig(
            name="metaclip",
            kind="open_clip",
            source=names[0],
            pretrained=names[1],
            width=width,
            max_tokens=max_tokens,
        )
    )


def test_clip_states_pool_and_project_to_open_clips_own_embedding(clip_names: tuple[str, str]):
    """The state at the end of the text, projected, is what `encode_text` returns."""
    values, mask = clip(clip_names).encode(PROMPTS)
    model = open_clip.create_model(clip_names[0], pretrained=clip_names[1])
    tokens = open_clip.get_tokenizer(clip_names[0])(PROMPTS)
    assert values.shape == (3, 77, 16)
    assert values.dtype == torch.float32
    assert mask.sum(dim=1).tolist() == (tokens != 0).sum(dim=1).tolist()
    assert mask.sum(dim=1).tolist()[1] == 2  # the empty prompt: start and end of text
    assert (values[~mask] == 0).all()
    ends = values[torch.arange(3), mask.sum(dim=1) - 1]
    projection = getattr(model, "text", model).text_projection
    with torch.no_grad():
        torch.testing.assert_close(ends @ projection, model.encode_text(tokens))


def test_clip_states_do_not_depend_on_the_batch_or_on_padding(clip_names: tuple[str, str]):
    together, mask = clip(clip_names).encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone, alone_mask = clip(clip_names, max_tokens=40).encode([prompt])
        torch.testing.assert_close(alone[alone_mask], together[row][mask[row]])


def test_clip_of_another_width_is_refused_with_both_numbers(clip_names: tuple[str, str]):
    with pytest.raises(UserError, match=r"width is 1280 .* has 16; set width to 16"):
        clip(clip_names, width=1280)


def test_clip_cannot_read_more_than_its_context(clip_names: tuple[str, str]):
    with pytest.raises(UserError, match="max_tokens 128 is more than the 77"):
        clip(clip_names, max_tokens=128)


@pytest.mark.parametrize(
    ("source", "pretrained", "message"),
    [
        ("ViT-Nowhere", "x", "has no model 'ViT-Nowhere'"),
        ("ViT-B-32", None, "no weights are named"),
        ("ViT-B-32", "nowhere.pt", "neither a file nor a known tag"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "no plain causal CLIP text tower"),
    ],
)
def test_models_that_cannot_serve_are_refused(
    source: str, pretrained: str | None, message: str, monkeypatch: pytest.MonkeyPatch
):
    # Only the architecture matters here, so no weights are fetched.
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, **_: create(name, device="meta"))
    with pytest.raises(UserError, match=message):
        build_text_encoder(
            TextEncoderConfig(
                name="clip",
                kind="open_clip",
                source=source,
                pretrained=pretrained,
                width=512,
                max_tokens=77,
            )
        )
