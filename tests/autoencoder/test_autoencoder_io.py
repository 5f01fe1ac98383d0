"""Autoencoder directories: saving, loading, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streamdit.autoencoder import (
    CausalAutoencoder,
    CausalAutoencoderConfig,
    load_autoencoder,
    save_autoencoder,
)
from streamdit.autoencoder.io import read_record
from streamdit.errors import UserError

CONFIG = CausalAutoencoderConfig(
    latent_channels=2,
    patch=(4, 8, 8),
    widths=(8,),
    strides=(),
    encoder_blocks=(1,),
    decoder_blocks=(1,),
)


@pytest.fixture
def autoencoder() -> CausalAutoencoder:
    torch.manual_seed(0)
    model = CausalAutoencoder(CONFIG)
    model.identity = model.identity.model_copy(update={"scale": (2.0, 0.5), "shift": (1.0, -1.0)})
    return model


def test_a_saved_autoencoder_loads_as_it_was(autoencoder: CausalAutoencoder, tmp_path: Path):
    identity = save_autoencoder(autoencoder, tmp_path / "ae", {"psnr": 31.5})
    loaded = load_autoencoder(tmp_path / "ae")
    clip = torch.rand(1, 8, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(clip), autoencoder.encode(clip))
    assert loaded.identity == identity == autoencoder.identity
    assert identity.source == str(tmp_path / "ae")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_record(tmp_path / "ae").training == {"psnr": 31.5}
    assert sorted(path.name for path in (tmp_path / "ae").iterdir()) == [
        "autoencoder.safetensors",
        "config.json",
    ]


def test_normalisation_uses_the_saved_scale_and_shift(
    autoencoder: CausalAutoencoder, tmp_path: Path
):
    save_autoencoder(autoencoder, tmp_path)
    loaded = load_autoencoder(tmp_path)
    raw = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1, 1)
    normal = loaded.normalise(raw)
    assert normal.flatten().tolist() == [4.0, 3.0]  # (3 - 1) * 2 and (5 + 1) * 0.5
    assert torch.equal(loaded.denormalise(normal), raw)


def test_the_hash_is_stable_over_save_and_load(autoencoder: CausalAutoencoder, tmp_path: Path):
    first = save_autoencoder(autoencoder, tmp_path / "a")
    second = save_autoencoder(load_autoencoder(tmp_path / "a"), tmp_path / "b")
    assert first.sha256 == second.sha256
    torch.nn.init.ones_(autoencoder.encoder.linear.weight)
    assert save_autoencoder(autoencoder, tmp_path / "a").sha256 != first.sha256


def test_weights_that_are_not_those_of_the_configuration_are_refused(
    autoencoder: CausalAutoencoder, tmp_path: Path
):
    save_autoencoder(autoencoder, tmp_path)
    weights = tmp_path / "autoencoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="do not belong together"):
        load_autoencoder(tmp_path)


def test_an_unfinished_save_leaves_no_configuration_behind(
    autoencoder: CausalAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A crash between the two files must not pair old configuration with new weights."""
    save_autoencoder(autoencoder, tmp_path)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streamdit.autoencoder.io.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_autoencoder(autoencoder, tmp_path)
    assert read_record(tmp_path) is None


def test_a_missing_directory_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(UserError, match=r"does not exist; train one with `streamdit train-auto"):
        load_autoencoder(tmp_path / "nowhere")


def test_a_directory_without_configuration_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version"),
        ({"surprise": 1}, "surprise"),
        ({"scale": [1.0]}, "scale has 1"),
    ],
)
def test_a_configuration_of_another_form_is_refused_by_key(
    autoencoder: CausalAutoencoder, tmp_path: Path, change: dict, message: str
):
    save_autoencoder(autoencoder, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_autoencoder(tmp_path)
