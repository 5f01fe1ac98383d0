"""Wan's weights in this model, compared with diffusers itself."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from wan_pipeline import VAE_TI2V, random_transformer, write_pipeline

import streamdit
from streamdit.config import BucketConfig, GammaConfig
from streamdit.convert import VideoShape, convert, expected_shapes
from streamdit.errors import UserError
from streamdit.flow import interpolate, velocity_target
from streamdit.io import load_model
from streamdit.model.convert import dit_config, read_wan_config, recipes
from streamdit.partition import apply_gamma
from streamdit.text import TextStates
from streamdit.weights import write_safetensors

SHAPE = VideoShape(frames=13, height=32, width=48)  # latents 4 x 4 x 6


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("sharded"), max_shard_size="40KB")


@pytest.fixture(scope="module")
def converted(pipeline, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "model"
    convert(str(pipeline), directory, SHAPE)
    return directory


def draws(batch=2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 4, 4, 6, generator=generator)
    states = [torch.randn(length, 16, generator=generator) for length in (5, 9)[:batch]]
    return latents, TextStates.collate([{"umt5": state} for state in states])


def wan_velocity(transformer, latents, tau, text):
    """Ours from diffusers: its prediction at its own time, with the other sign."""
    values, _ = text["umt5"]
    padded = torch.nn.functional.pad(values, (0, 0, 0, 512 - values.shape[1]))
    uniform = bool((tau == tau[:, :1]).all())
    tokens = (latents.shape[3] // 2) * (latents.shape[4] // 2)
    time = 1000.0 * (1.0 - tau)
    predicted = transformer(
        latents.transpose(1, 2),
        time[:, 0] if uniform else time.repeat_interleave(tokens, dim=1),
        padded,
    ).sample
    return -predicted.transpose(1, 2)


@pytest.mark.parametrize("uniform", [True, False])
def test_velocity_equals_diffusers(pipeline, converted, uniform):
    model, _ = load_model(converted)
    transformer = WanPipeline.from_pretrained(pipeline).transformer
    latents, text = draws()
    tau = torch.tensor([[0.9, 0.6, 0.3, 0.05], [1.0, 0.7, 0.35, 0.0]])
    if uniform:
        tau = tau[:, 1:2].expand(2, 4)
    with torch.no_grad():
        expected = wan_velocity(transformer, latents, tau, text)
        found = model(latents, tau, text)
    assert expected.std() > 0.1
    assert (found - expected).norm() / expected.norm() < 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_sign_and_time_follow_from_the_two_paths():
    """At noise level sigma, Wan's sample and target are ours at tau = 1 - sigma."""
    data, noise = torch.randn(2, 1, 3, 4, 2, 2)
    scheduler = FlowMatchEulerDiscreteScheduler()
    sigma = 0.25
    step = torch.tensor([1000.0 * sigma])
    theirs = scheduler.scale_noise(data, step, noise)
    torch.testing.assert_close(theirs, interpolate(data, noise, torch.full((1, 3), 1.0 - sigma)))
    # One step of theirs against the time axis arrives where one of ours along it does.
    scheduler.set_timesteps(sigmas=[sigma])
    moved = scheduler.step(noise - data, scheduler.timesteps[0], theirs).prev_sample
    torch.testing.assert_close(moved, theirs + sigma * velocity_target(data, noise))
    torch.testing.assert_close(moved, data)


def test_sharded_weights_give_the_same_file(sharded, converted, tmp_path):
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 2
    seen = []
    convert(str(sharded), tmp_path / "m", SHAPE, on_progress=lambda *at: seen.append(at))
    one, many = (d / "model.safetensors" for d in (converted, tmp_path / "m"))
    assert one.read_bytes() == many.read_bytes()
    total = len(load_file(one))
    assert seen == [(count, total) for count in range(1, total + 1)]


def test_chosen_precision_rounds_the_weights(pipeline, converted, tmp_path):
    convert(str(pipeline), tmp_path / "m", SHAPE, dtype=torch.bfloat16)
    exact = load_file(converted / "model.safetensors")
    for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16())


def test_converted_model_loads_and_streams(converted):
    model = streamdit.load(converted, device="cpu")
    assert model.config.fps == 16
    assert model.config.partition.gamma.shift == 3.0
    assert model.config.model.buckets[0].window == (4, 2, 3)
    assert (converted / "autoencoder" / "config.json").is_file()
    sampling = model.config.sampling.model_copy(update={"micro_steps": 3})
    stream = model.stream("a cat", seed=1, sampling=sampling)
    first, second = next(stream), next(stream)
    assert first.frames.shape == (13, 32, 48, 3)
    assert second.frames.shape == (16, 32, 48, 3)
    assert np.ptp(first.frames) > 0


def test_first_clip_equals_that_of_the_diffusers_pipeline(pipeline, converted):
    """Text encoder, padding, model, schedule, sampler and decoder together."""

    class EvenSteps(FlowMatchEulerDiscreteScheduler):
        """Steps of one width before the shift, from pure noise to data."""

        def set_timesteps(self, number, device=None):
            sigmas = [1.0 - step / number for step in range(number)]
            super().set_timesteps(sigmas=sigmas, device=device)

    wan = WanPipeline.from_pretrained(pipeline)
    wan.scheduler = EvenSteps(shift=3.0)
    wan.set_progress_bar_config(disable=True)
    model = streamdit.load(converted, device="cpu")
    steps = 4
    sampling = model.config.sampling.model_copy(update={"micro_steps": steps})
    stream = model.stream("a cat", seed=5, sampling=sampling)
    noise = stream.denoiser.buffer.transpose(1, 2).clone()
    expected = wan(
        "a cat",
        height=32,
        width=48,
        num_frames=13,
        num_inference_steps=steps,
        guidance_scale=5.0,
        latents=noise,
        output_type="np",
    ).frames[0]
    found = next(stream).frames
    difference = np.abs(found.astype(float) - 255.0 * expected)
    assert np.std(255.0 * expected) > 5
    assert difference.mean() < 1.0


def test_ti2v_models_bring_their_larger_autoencoder(tmp_path):
    source = write_pipeline(tmp_path / "ti2v", vae=VAE_TI2V)
    config = convert(str(source), tmp_path / "m", VideoShape(frames=5, height=64, width=64))
    assert config.autoencoder.spatial_factor == 16
    assert streamdit.load(tmp_path / "m", device="cpu").autoencoder.patch == 2


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        # Wan 2.1 T2V-1.3B, Wan 2.1 T2V-14B and Wan 2.2 TI2V-5B, by their published shapes.
        ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.42e9),
        ({"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 14.3e9),
        (
            {
                "num_attention_heads": 24,
                "ffn_dim": 14336,
                "num_layers": 30,
                "in_channels": 48,
                "out_channels": 48,
            },
            5.0e9,
        ),
    ],
)
def test_published_shapes_fit_tensor_by_tensor(settings, parameters):
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**settings)
    wan = read_wan_config(dict(theirs.config) | {"_class_name": "WanTransformer3DModel"}, "wan")
    model = dit_config(
        wan, BucketConfig(frames=16, height=60, width=104, window=(16, 30, 52)), "umt5"
    )
    state, made, shapes = theirs.state_dict(), recipes(wan, "umt5"), expected_shapes(model)
    assert {source for recipe in made.values() for source in recipe.sources} == state.keys()
    for name, shape in shapes.items():
        tensor = made[name].combine([state[source] for source in made[name].sources])
        assert tuple(tensor.shape) == shape
    total = sum(tensor.numel() for tensor in state.values())
    assert total == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == pytest.approx(parameters, rel=0.02)


def test_shifted_schedule_is_that_of_diffusers():
    gamma = GammaConfig(kind="shifted", shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    tau = apply_gamma(1.0 - torch.tensor([0.9, 0.5, 0.1, 0.0]), gamma)
    torch.testing.assert_close(1.0 - tau, scheduler.sigmas)


def test_two_experts_are_refused_with_the_reason(tmp_path):
    source = write_pipeline(
        tmp_path / "a14b", transformer_2=random_transformer(1), boundary_ratio=0.875
    )
    with pytest.raises(UserError, match=r"two transformers.*noise level 0.875.*both sides"):
        convert(str(source), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["two experts", "image-to-video"])
def test_a_hub_model_that_cannot_be_converted_is_not_downloaded(tmp_path, monkeypatch, kind):
    changes = {"transformer_2": random_transformer(1), "boundary_ratio": 0.875}
    source = write_pipeline(tmp_path / "hub", **(changes if kind == "two experts" else {}))
    if kind == "image-to-video":
        config = source / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 36}))
    cache = tmp_path / "cache"

    def snapshot_download(name, allow_patterns):
        assert name == "Wan-AI/some-model"
        for path in (path for path in source.rglob("*") if path.is_file()):
            relative = path.relative_to(source)
            if any(fnmatch(relative.as_posix(), pattern) for pattern in allow_patterns):
                (cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, cache / relative)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    message = "two transformers" if kind == "two experts" else "conditioned on images"
    with pytest.raises(UserError, match=message):
        convert("Wan-AI/some-model", tmp_path / "m")
    assert (cache / "transformer" / "config.json").is_file()
    assert not list(cache.rglob("*.safetensors"))


def edited(pipeline, tmp_path, file, **changes):
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    values = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(values | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 36}, "conditioned on images"),
        ({"image_dim": 1280}, "conditioned on images"),
        ({"_class_name": "WanVACETransformer3DModel"}, "its transformer is a WanVACE"),
        ({"qk_norm": None}, "qk_norm None of its transformer is not supported"),
        ({"ffn_dim": 96}, r"ffn.net.0.proj.weight has shape \[80, 48\] where .* \[96, 48\]"),
        ({"num_layers": 4}, "blocks.3.* is missing from"),
        ({"num_layers": 2}, "blocks.2.* has no place in this model"),
    ],
)
def test_other_transformers_are_refused_with_the_reason(pipeline, tmp_path, changes, message):
    source = edited(pipeline, tmp_path, "transformer/config.json", **changes)
    with pytest.raises(UserError, match=message):
        convert(str(source), tmp_path / "m", SHAPE)
    assert not list(tmp_path.glob("*m*"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (VideoShape(frames=16), "16 frames do not fit the Wan autoencoder"),
        (VideoShape(height=40, width=48), "size 40x48 is not a multiple of 16"),
        (VideoShape(13, 32, 48, (4, 2, 2)), "window 4x2x2 does not divide the token grid 4x2x3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(pipeline, tmp_path, shape, message):
    with pytest.raises(UserError, match=message):
        convert(str(pipeline), tmp_path / "m", shape)


def test_a_place_without_a_pipeline_is_refused(pipeline, tmp_path):
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        convert(str(pipeline / "transformer"), tmp_path / "m")
    with pytest.raises(UserError, match="does not exist"):
        convert(str(tmp_path / "nothing"), tmp_path / "m")
    (tmp_path / "shard").mkdir()
    copy = shutil.copytree(pipeline, tmp_path / "shard" / "wan")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        convert(str(copy), tmp_path / "m", SHAPE)


def test_tensors_written_one_by_one_are_read_back(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.tensor(2.5),
        "c": torch.randn(4, 6).t(),
        "d": torch.randn(7).half(),
    }
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "file", kinds, tensors.items())
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
