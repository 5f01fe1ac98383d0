"""Model directories: written whole, read back the same, refused when damaged."""

import json
import shutil

import pytest
import torch
from latent_dataset import ENCODERS
from model_directory import model_config, random_weights, write_model_directory
from safetensors.torch import load_file, save_file

import streamdit
from streamdit.config import SamplingConfig
from streamdit.errors import UserError
from streamdit.io import load_model, read_model_config, save_model_directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("model"))


def test_saved_model_loads_back_with_the_same_weights_and_configuration(model_dir):
    model, config = load_model(model_dir)
    expected = random_weights(config)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert config.autoencoder.source == "autoencoder"
    assert config.weights_sha256


def test_model_directory_is_self_contained(model_dir, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(model_dir, moved)
    loaded = streamdit.load(moved)
    assert loaded.autoencoder.identity.sha256 == loaded.config.autoencoder.sha256
    assert next(loaded.stream("a red circle")).frames.shape == (4, 32, 32, 3)


def test_failed_save_leaves_the_old_directory_alone(model_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(model_dir, target)
    config = read_model_config(target)
    with pytest.raises(AttributeError):
        save_model_directory(target, config, {"not a tensor": None}, target)
    load_model(target)


def test_damaged_weights_are_refused(model_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(model_dir, target)
    weights = load_file(target / "model.safetensors")
    weights["patch_embedding.bias"] += 1
    save_file(weights, target / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors has SHA-256 .* but its config"):
        load_model(target)


def test_weights_of_another_shape_are_refused_by_name(model_dir, tmp_path):
    config = read_model_config(model_dir)
    weights = random_weights(config)
    weights["patch_embedding.bias"] = torch.zeros(3)
    target = save_model_directory(tmp_path / "model", config, weights, model_dir)
    with pytest.raises(UserError, match=r"first at patch_embedding\.bias"):
        load_model(target)


def test_a_path_that_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no model directory"):
        streamdit.load(tmp_path / "nothing")


def test_another_autoencoder_than_the_latents_were_made_with_is_refused(tmp_path):
    target = write_model_directory(tmp_path)
    config = read_model_config(target)
    wrong = config.autoencoder.model_copy(update={"sha256": "0" * 64})
    (target / "config.json").write_text(
        config.model_copy(update={"autoencoder": wrong}).model_dump_json()
    )
    with pytest.raises(UserError, match="was trained on latents of 000000000000"):
        streamdit.load(target)


@pytest.mark.parametrize("what", ["scale", "shift"])
def test_another_normalisation_of_latents_is_refused(what, tmp_path):
    target = write_model_directory(tmp_path)
    path = target / "autoencoder" / "config.json"
    record = json.loads(path.read_text())
    record[what][0] += 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"has another {what} of its latents than the model was"):
        streamdit.load(target)


def test_schemes_of_the_training_mix_are_served_and_others_refused(model_dir):
    loaded = streamdit.load(model_dir)
    for chunk, steps in ((1, 3), (2, 1), (4, 2)):
        scheme = loaded.scheme(SamplingConfig(chunk_frames=chunk, micro_steps=steps))
        assert (scheme.c, scheme.N, scheme.s) == (chunk, 4 // chunk, steps)
    with pytest.raises(UserError, match="K=2 c=1 was not in this model's training mix"):
        loaded.scheme(SamplingConfig(chunk_frames=1, micro_steps=1, reference_frames=2))


def test_configuration_whose_parts_do_not_fit_is_refused(model_dir):
    identity = read_model_config(model_dir).autoencoder
    wider = ENCODERS[0].model_copy(update={"width": 32})
    with pytest.raises(ValueError, match="does not match the text encoders"):
        model_config(identity, text_encoders=(wider,))
    with pytest.raises(ValueError, match="latent_channels 4 does not match the autoencoder's 2"):
        model_config(
            identity.model_copy(
                update={"latent_channels": 2, "scale": (1.0, 1.0), "shift": (0.0, 0.0)}
            )
        )
