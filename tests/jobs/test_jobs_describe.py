"""`streamdit describe`: sizes and costs that agree with the model itself."""

import json

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.config import load_config
from streamdit.config import AutoencoderIdentity, StreamDiTConfig, TextEncoderConfig
from streamdit.io import save_model_directory
from streamdit.model import StreamDiT
from streamdit.model.flops import count_flops
from streamdit.published import TEXT_ENCODERS, WAN_AUTOENCODERS
from training.config import TrainConfig


def describe(*arguments):
    result = CliRunner().invoke(app, ["describe", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def demo():
    return load_config(TrainConfig, stage="train", preset="demo")


def test_preset_has_the_parameters_of_the_model_that_it_builds():
    facts = json.loads(describe("demo", "--json"))
    built = sum(parameter.numel() for parameter in StreamDiT(demo().model).parameters())
    assert facts["parameters"] == built == sum(facts["parameters_by_part"].values())
    assert facts["weights_bytes"] == {"bfloat16": 2 * built, "float32": 4 * built}


def test_preset_has_the_shapes_and_costs_of_its_configuration():
    facts = json.loads(describe("demo", "--json"))
    config = demo()
    (bucket,) = facts["buckets"]
    assert bucket["latent"] == [8, config.model.latent_channels, 8, 8]
    assert bucket["video"] == [32, 64, 64]
    assert bucket["flops_per_forward"] == count_flops(config.model, text_tokens=64)["total"]
    assert [(e["K"], e["N"], e["c"]) for e in facts["partition"]] == [
        (0, 8, 1),
        (0, 4, 2),
        (0, 2, 4),
        (0, 1, 8),
    ]
    assert sum(entry["share"] for entry in facts["partition"]) == pytest.approx(1)


def test_guidance_doubles_the_evaluations_of_a_chunk():
    scheme = ("sampling.chunk_frames=2", "sampling.micro_steps=3")
    guided = json.loads(describe("demo", *scheme, "sampling.guidance_scale=3", "--json"))
    plain = json.loads(describe("demo", *scheme, "sampling.guidance_scale=1", "--json"))
    assert guided["sampling"]["evaluations_per_chunk"] == 6
    assert plain["sampling"]["evaluations_per_chunk"] == 3
    assert plain["sampling"]["steps_per_frame"] == 12
    assert plain["sampling"]["video_frames_per_chunk"] == 8


def test_setting_changes_what_is_described_and_nothing_is_allocated():
    # A petabyte of weights: only the meta device can build this.
    facts = json.loads(describe("demo", "model.width=2097152", "model.depth=8", "--json"))
    assert facts["parameters"] > 1e14


def test_table_shows_the_same_in_words():
    text = describe("demo", "sampling.guidance_scale=1", "sampling.micro_steps=1")
    facts = json.loads(describe("demo", "--json"))
    assert f"{facts['parameters']:,}" in text
    assert "32 frames of 64×64" in text
    assert "4 video frames for 1 evaluation (" in text
    assert "no guidance" in text
    assert "memory of one stream" in text
    assert "least time on one H100 SXM" in text


def test_memory_of_the_4b_preset_names_every_part():
    facts = json.loads(describe("streamdit-4b", "--json"))
    inference = facts["memory"]["inference"]
    assert inference["model"] == 2 * facts["parameters"]
    assert inference["text_encoders"] == {
        name: 2 * TEXT_ENCODERS[name].parameters for name in ("ul2", "byt5", "metaclip")
    }
    parts = {name: size for name, size in inference.items() if name != "total"}
    encoders = sum(parts.pop("text_encoders").values())
    assert inference["total"] == encoders + sum(parts.values())
    # The default autoencoder, which its configuration calls one of 93M parameters.
    assert inference["autoencoder"] == pytest.approx(4 * 93e6, rel=0.01)


def test_training_memory_follows_the_settings_of_the_run():
    settings = ("launch.workers=64", "global_batch=128", "activation_checkpointing=false")
    training = json.loads(describe("streamdit-4b", *settings, "--json"))["memory"]["training"]
    assert (training["world_size"], training["micro_batch"]) == (64, 2)
    assert training["stages"]["3"]["activations"] == training["activations"]["kept"]
    totals = [stage["total"] for stage in training["stages"].values()]
    assert totals == sorted(totals, reverse=True)
    for stage in training["stages"].values():
        state = sum(stage[name] for name in ("weights", "gradients", "optimizer", "ema"))
        assert stage["total"] == state + max(stage["activations"], stage["step"])
    offloaded = json.loads(describe("streamdit-4b", *settings, "offload_optimizer=true", "--json"))[
        "memory"
    ]["training"]["stages"]
    assert {stage["optimizer"] for stage in offloaded.values()} == {0}


def test_the_fewest_recomputed_blocks_that_fit_a_gpu_are_named():
    settings = ("launch.workers=64", "global_batch=128", "--gpu", "h100", "--json")

    def training(*more):
        return json.loads(describe("streamdit-4b", *more, *settings))["memory"]["training"]

    fewest = training()["fewest_recomputed"]
    assert 0 < fewest["3"] < fewest["2"] < 28
    for stage in ("2", "3"):
        blocks = fewest[stage]
        fits, tight = (
            training(f"activation_checkpointing={count}")["stages"][stage]["total"]
            for count in (blocks, blocks - 1)
        )
        assert fits <= 0.9 * 80e9 < tight
    alone = json.loads(describe("streamdit-4b", "launch.workers=1", "global_batch=1", "--json"))
    assert alone["memory"]["training"]["fewest_recomputed"] == {"1": None, "2": None, "3": None}


def test_least_time_is_operations_over_peak_rate_or_weights_over_bandwidth():
    facts = json.loads(describe("streamdit-4b", "--gpu", "h100", "--json"))
    floor, bucket = facts["floor"], facts["buckets"][0]
    once = ("text_projection", "text_keys_values", "time_embedding", "modulation")
    flops = bucket["flops_per_forward"] - sum(bucket["flops_by_part"][part] for part in once)
    assert floor["configured"]["flops"] == 2 * flops  # guidance
    assert floor["distilled"]["flops"] == flops
    assert floor["distilled"]["step"] == pytest.approx(flops / 989e12)
    assert floor["distilled"]["frames_per_second"] == pytest.approx(8 * 989e12 / flops)
    outside = sum(
        bucket["flops_by_part"][part]
        for part in ("patch_embedding", "time_embedding", "text_projection", "output")
    )
    again = bucket["flops_per_forward"] - outside - 2 * 2 * 16 * 2560**2  # the output's modulation
    training = (3 * bucket["flops_per_forward"] + again) / 989e12
    assert floor["training_micro_batch"] == pytest.approx(training)
    small = json.loads(describe("demo", "--gpu", "A100", "--json"))["floor"]
    # Guidance doubles the operations and not the reading, which is what remains longer without it.
    assert small["configured"]["step"] == small["configured"]["compute"]
    assert small["distilled"]["step"] == small["distilled"]["bandwidth"]
    assert small["distilled"]["step_fp8"] is None


def test_wan_preset_has_clips_of_61_frames():
    facts = json.loads(describe("streamdit-4b-wan", "--json"))
    assert facts["buckets"][0]["video"] == [61, 512, 512]
    assert facts["memory"]["inference"]["autoencoder"] == 4 * WAN_AUTOENCODERS[16]


def test_unknown_gpu_lists_the_known():
    result = CliRunner().invoke(app, ["describe", "demo", "--gpu", "h1000"])
    assert result.exit_code == 2
    assert "--gpu h1000 is not known: choose one of h200, h100" in result.stderr


@pytest.fixture
def model_directory(tmp_path):
    plan = demo()
    config = StreamDiTConfig(
        model=plan.model,
        partition=plan.partition,
        sampling=plan.sampling,
        autoencoder=AutoencoderIdentity(
            kind="causal",
            source="elsewhere",
            sha256="0" * 64,
            latent_channels=16,
            first_frame_alone=True,
            scale=(1.0,) * 16,
            shift=(0.0,) * 16,
        ),
        text_encoders=(TextEncoderConfig(name="bytes", kind="bytes", width=256, max_tokens=40),),
        fps=24,
    )
    return save_model_directory(tmp_path / "model", config, {})


def test_model_directory_is_described_by_its_own_record(model_directory):
    facts = json.loads(describe(model_directory, "--json"))
    assert facts["parameters"] == json.loads(describe("demo", "--json"))["parameters"]
    assert facts["text_tokens"] == 40
    assert facts["memory"]["inference"]["autoencoder"] is None
    assert facts["fps"] == 24
    assert facts["buckets"][0]["video"] == [29, 64, 64]
    expected = count_flops(demo().model, text_tokens=40)["total"]
    assert facts["buckets"][0]["flops_per_forward"] == expected


def test_settings_of_a_trained_model_cannot_be_changed(model_directory):
    result = CliRunner().invoke(app, ["describe", str(model_directory), "model.width=8"])
    assert result.exit_code == 2
    assert "whose settings are fixed" in result.stderr


def test_unknown_name_lists_the_presets():
    result = CliRunner().invoke(app, ["describe", "dmeo"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: dmeo is neither a training preset (demo, small, ")
    assert len(result.stderr.splitlines()) == 1
