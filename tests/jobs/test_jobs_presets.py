"""Presets that ship with the package."""

import math

import pytest
import torch

from distillation.config import DistillConfig
from jobs.config import available_presets, load_config, read_preset
from jobs.model_facts import describe, find_subject
from jobs.options import DEFAULT_PRESET
from pipeline.config import IngestConfig
from streamdit.gpus import GPUS
from streamdit.model import StreamDiT
from streamdit.partition import PartitionMixture, PartitionScheme
from streamdit.published import TEXT_ENCODERS
from training.autoencoder_config import AutoencoderTrainConfig
from training.config import TrainConfig


@pytest.mark.parametrize("preset", available_presets("train"))
def test_presets_of_one_name_fit_each_other(preset):
    """What `ingest` makes, `train` takes and `distill` continues, each with the same preset."""
    ingest = load_config(IngestConfig, stage="ingest", preset=preset)
    train = load_config(TrainConfig, stage="train", preset=preset)
    distill = load_config(DistillConfig, stage="distill", preset=preset)
    bucket = train.model.buckets[0]
    assert (ingest.clip.height, ingest.clip.width) == (8 * bucket.height, 8 * bucket.width)
    assert ingest.clip.frames == 4 * train.model.buffer_frames
    assert {encoder.name: encoder.width for encoder in ingest.text_encoders} == train.model.text
    if train.autoencoder != "wan":
        autoencoder = load_config(AutoencoderTrainConfig, stage="autoencoder", preset=preset)
        assert autoencoder.model.latent_channels == train.model.latent_channels
        shape = autoencoder.model
        factors = [math.prod(sides) for sides in zip(shape.patch, *shape.strides, strict=True)]
        assert factors == [4, 8, 8]
    teacher = distill.teacher
    scheme = PartitionScheme.for_buffer(
        train.model.buffer_frames, teacher.chunk_frames, teacher.micro_steps
    )
    assert PartitionMixture(train.partition, train.model.buffer_frames).serves(scheme)
    assert teacher.micro_steps == train.sampling.micro_steps


@pytest.mark.parametrize("stage", ["ingest", "autoencoder", "distill"])
def test_what_commands_take_by_default_fits_too(stage):
    assert DEFAULT_PRESET in available_presets("train")
    assert set(available_presets(stage)) <= set(available_presets("train"))


@pytest.mark.parametrize("preset", available_presets("train"))
def test_presets_fit_the_gpus_that_they_ask_for(preset):
    config = train_preset(preset)
    subject = find_subject(preset, None, [])
    training = describe(subject, GPUS["h100"])["memory"]["training"]
    assert training["stages"][str(config.zero_stage)]["total"] < 0.9 * 80e9


@pytest.mark.parametrize("preset", [p for p in available_presets("ingest") if "4b" in p])
def test_4b_data_has_the_text_states_of_the_published_encoders(preset):
    encoders = load_config(IngestConfig, stage="ingest", preset=preset).text_encoders
    assert encoders == tuple(TEXT_ENCODERS[name].config for name in ("ul2", "byt5", "metaclip"))


def train_preset(name):
    return load_config(TrainConfig, stage="train", preset=name)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("streamdit-4b", 4.0e9),
        ("streamdit-4b-single", 4.0e9),
        ("streamdit-4b-wan", 4.0e9),
        ("small", 1.0e8),
    ],
)
def test_presets_have_the_size_that_they_are_known_by(preset, parameters):
    with torch.device("meta"):
        model = StreamDiT(train_preset(preset).model)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)


def test_streamdit_4b_is_the_model_of_the_paper():
    model = train_preset("streamdit-4b").model
    bucket = model.buckets[0]
    assert (bucket.frames, model.latent_channels, bucket.height, bucket.width) == (16, 8, 64, 64)
    assert model.patch == (1, 2, 2)
    assert (model.width, model.depth, model.heads, model.ffn_width) == (2560, 28, 20, 10240)
    assert (model.modulation, model.qk_norm) == ("zero", "per_head")
    assert bucket.window == (8, 16, 16)
    assert model.temporal_wrap
    assert model.text == {"ul2": 4096, "byt5": 1472, "metaclip": 1280}


@pytest.mark.parametrize(
    ("preset", "differences"),
    [
        ("streamdit-4b-single", {"modulation": "single", "depth": 38}),
        ("streamdit-4b-wan", {"latent_channels": 16}),
    ],
)
def test_variants_of_the_4b_preset_differ_in_what_they_are_named_for(preset, differences):
    base, variant = train_preset("streamdit-4b"), train_preset(preset)
    assert variant.model == base.model.model_copy(update=differences)
    assert variant.autoencoder == ("wan" if preset == "streamdit-4b-wan" else None)
    assert variant.model_copy(update={"model": base.model, "autoencoder": None}) == base


def test_base_of_a_preset_is_overlaid_by_its_own_keys():
    values = read_preset("train", "streamdit-4b-single")
    base = read_preset("train", "streamdit-4b")
    assert "base" not in values
    assert values.model.pop("depth") == 38
    assert values.model.pop("modulation") == "single"
    assert base.model.pop("depth") == 28
    assert base.model.pop("modulation") == "zero"
    assert values == base
