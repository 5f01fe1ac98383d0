"""`streamdit plan`: its arithmetic against numbers worked out by hand, and what it prints."""

import json
import math

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.sizing import (
    Failures,
    Fleet,
    IngestRates,
    checkpoint_bytes,
    dataset_size,
    distillation_flops,
    gradient_traffic,
    training_flops,
)
from streamdit.config import BucketConfig, DiTConfig

MODEL = DiTConfig(
    latent_channels=8,
    buckets=(BucketConfig(frames=16, height=64, width=64, window=(8, 16, 16)),),
    width=64,
    depth=2,
    heads=2,
    ffn_width=128,
    text={"a": 4096, "b": 1280},
)


def run(*options):
    result = CliRunner().invoke(app, ["plan", *options], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def facts(*options):
    return json.loads(run(*options, "--json"))


def test_dataset_is_latents_and_unpadded_text_in_shards():
    size = dataset_size(1000, MODEL, MODEL.buckets[0], caption_tokens=50, shard_bytes=512e6)
    assert size.latent_bytes == 16 * 8 * 64 * 64 * 2 == 1_048_576
    assert size.text_bytes == 50 * (4096 + 1280) * 2 == 537_600
    assert size.bytes == 1000 * (1_048_576 + 537_600)
    # 1.048 GB and 0.538 GB in files of 512 MB: 3 + 2.
    assert size.shards == 5


def test_steps_take_their_operations_at_the_rate_of_all_gpus():
    fleet = Fleet(gpus=4, peak=100e12, mfu=0.5)
    # 3 × 10 TFLOP × 20 clips = 600 TFLOP, at 200 TFLOP/s.
    assert training_flops(10e12, batch=20) == 600e12
    assert fleet.step_seconds(600e12) == 3.0
    # A teacher of 16 guided steps is 32 forward passes; the student adds 3.
    assert distillation_flops(1e12, 2, micro_steps=16, guided=True) == 70e12
    assert distillation_flops(1e12, 2, micro_steps=16, guided=False) == 38e12


def test_sent_gradients_and_weights_grow_with_stage_three():
    # Two passes over 1000 parameters of two bytes, of which 3/4 leave a GPU of four.
    assert gradient_traffic(1000, 1, gpus=4) == gradient_traffic(1000, 2, gpus=4) == 3000
    assert gradient_traffic(1000, 3, gpus=4) == 4500
    assert gradient_traffic(1000, 2, gpus=1) == 0


def test_checkpoint_has_weights_optimizer_and_average():
    assert checkpoint_bytes(1_000_000) == 18_000_000


def test_ingestion_is_as_fast_as_its_machines_together():
    rates = IngestRates(curate=10, annotate=2, encode=4)
    # 8,000 s of video at 10 × 8; 800 clips at 2 × 8; 800 at 4 × 2.
    assert rates.seconds(8000, 800, cpus=8, gpus=2) == {
        "curate": 100,
        "annotate": 50,
        "encode": 100,
    }


def test_lost_share_is_saving_repeating_and_restarting():
    failures = Failures(mtbf=100_000, save=10, restart=500)
    # Each 1,010 s: 10 s of saving. Each 100,000 s: half a cycle again, and 500 s of restart.
    assert failures.loss(1000) == pytest.approx(10 / 1010 + 505 / 100_000 + 500 / 100_000)


def test_best_interval_loses_less_than_any_other():
    failures = Failures(mtbf=391 * 3600, save=7.4, restart=600)
    best = failures.best_interval
    assert best == pytest.approx(math.sqrt(2 * 7.4 * (391 * 3600 + 600)) - 7.4)
    searched = min((failures.loss(x), x) for x in range(60, 20_000, 5))[1]
    assert best == pytest.approx(searched, rel=0.01)


def test_failures_that_come_while_saving_do_not_make_the_interval_negative():
    assert Failures(mtbf=1, save=100, restart=0).best_interval == 100


def test_paper_scale_in_numbers():
    found = facts("--clips", "2.6e6", "--gpus", "128", "--mfu", "0.4")
    described = json.loads(CliRunner().invoke(app, ["describe", "streamdit-4b", "--json"]).output)
    forward = found["forward_flops"]
    assert found["parameters"] == described["parameters"]
    assert found["dataset"]["latent_bytes"] == 2.6e6 * 1_048_576
    # 64 frames at 16 per second: 4 s each.
    assert found["dataset"]["video_s"] == 2.6e6 * 4
    names = [stage["name"] for stage in found["stages"]]
    assert names == ["task learning", "generalisation", "quality", "distillation"]
    first, last = found["stages"][0], found["stages"][-1]
    assert first["step_s"] == pytest.approx(3 * forward * 128 / (128 * 989e12 * 0.4))
    assert first["total_s"] == pytest.approx(10_000 * first["step_s"])
    assert first["paper_gpus_s"] == pytest.approx(first["total_s"])
    # A batch of 64 keeps 64 GPUs busy, however many there are; the paper used as many.
    assert last["gpus"] == last["paper_gpus"] == 64
    assert last["step_s"] == pytest.approx((2 * 16 + 3) * forward * 64 / (64 * 989e12 * 0.4))
    parameters = found["parameters"]
    for memory in found["memory"]:
        stage = memory["zero_stage"]
        assert memory["optimizer"] == -(-12 * parameters // 128)
        assert memory["weights"] == (2 * parameters if stage < 3 else -(-2 * parameters // 128))
    assert found["checkpoint"]["bytes"] == 18 * parameters
    assert found["failures"]["mtbf_s"] == 50_000 * 3600 / 128


def test_measured_rates_replace_what_is_assumed():
    slow, fast = facts(), facts("--encode-rate", "2", "--mfu", "0.5", "--storage", "20")
    assert fast["ingest_s"]["encode"] == slow["ingest_s"]["encode"] / 2
    assert fast["stages"][0]["total_s"] == pytest.approx(slow["stages"][0]["total_s"] * 0.4 / 0.5)
    assert fast["checkpoint"]["save_s"] == slow["checkpoint"]["save_s"] / 2


def test_curating_looks_at_all_video_and_the_rest_only_at_what_is_kept():
    half, tenth = facts("--keep", "0.5"), facts("--keep", "0.1")
    assert half["dataset"]["video_s"] == tenth["dataset"]["video_s"] == 2.6e6 * 4
    assert half["dataset"]["raw_video_s"] == 2.6e6 * 4 / 0.5
    # 20.8e6 s at 10 s per second of each of 512 cores.
    assert half["ingest_s"]["curate"] == pytest.approx(20.8e6 / (10 * 512))
    assert tenth["ingest_s"]["curate"] == pytest.approx(5 * half["ingest_s"]["curate"])
    assert tenth["ingest_s"]["annotate"] == half["ingest_s"]["annotate"]
    assert tenth["ingest_s"]["encode"] == half["ingest_s"]["encode"]


def test_distillation_is_that_of_the_preset_or_the_papers():
    from distillation.config import DistillConfig
    from jobs.config import load_config

    for preset, gpus in (("small", "8"), ("streamdit-4b", "64")):
        config = load_config(DistillConfig, stage="distill", preset=preset)
        settings = ("global_batch=64",) if preset == "small" else ()
        stage = facts("--preset", preset, "--gpus", gpus, *settings)["stages"][-1]
        assert (stage["steps"], stage["batch"]) == (config.steps, config.global_batch)


def test_more_gpus_than_clips_in_a_batch_is_said():
    result = CliRunner().invoke(app, ["plan", "--gpus", "96"])
    assert result.exit_code == 2
    assert "global_batch 128 is not divisible by 96 workers" in result.output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--gpu", "abacus"], "--gpu abacus is not known: choose one of"),
        (["--mfu", "0"], "mfu 0 is impossible"),
        (["--clips", "-1"], "clips -1 is impossible"),
        (["--keep", "1.5"], "keep 1.5 is impossible: give a share of at most 1"),
        (["--preset", "huge"], "preset 'huge' does not exist"),
    ],
)
def test_impossible_wishes_are_one_line(options, reason):
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 2
    assert reason in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_tables_show_the_numbers_and_what_was_assumed():
    text = run("--gpus", "8", "--preset", "small", "global_batch=64")
    for word in ("latents", "distillation", "ZeRO 3", "checkpoint", "Assumed", "MFU 40%"):
        assert word in text
