"""`streamdit bench`: figures that follow from the times, and variants that agree with plain."""

import json
import math
import time

import numpy as np
import pytest
import torch
from model_directory import write_model_directory
from typer.testing import CliRunner
from wan_pipeline import write_pipeline

from jobs.bench_facts import decoding_facts
from jobs.bench_rows import CEILING, Effort, Failures, Row
from jobs.bench_steps import FULL_ATTENTION, float8_verdict
from jobs.bench_streams import NO_DECODING, measure_streams
from jobs.bench_subject import (
    DecodingSubject,
    full_attention,
    most_text_tokens,
    preset_decoding,
    prompt_of,
    random_autoencoder,
    random_subject,
)
from jobs.bench_table import bench_table
from jobs.bench_train import TrainingSubject
from jobs.bench_variants import FLOAT8, PLAIN, decoder_variants, step_variants
from jobs.cli import app
from jobs.config import load_config
from jobs.measure import Timings, float8_matmul_action, interleave, matmul_action, sustain
from streamdit.autoencoder import load_autoencoder
from streamdit.autoencoder.io import save_autoencoder
from streamdit.decoding import ChunkDecoder
from streamdit.errors import UserError
from streamdit.io import read_model_config
from streamdit.model.fast import FastConfig
from streamdit.model.flops import PER_PROMPT, PER_SCHEDULE, count_flops
from streamdit.text.hashed_bytes import tokenise
from training.config import TrainConfig

CPU = torch.device("cpu")


def bench(tmp_path, *arguments):
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(
        app, ["bench", *arguments, "--preset", "demo", "--rounds", "2", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text()), result.stdout


def test_percentiles_and_paired_ratios_equal_numpys():
    first, second = Timings([3.0, 9.0, 1.0, 4.0, 7.5]), Timings([1.0, 2.0, 4.0, 1.0, 2.5])
    for percent in (0, 5, 50, 95, 100):
        expected = np.percentile(first.milliseconds, percent)
        assert first.percentile(percent) == pytest.approx(expected)
    ratios = np.array(first.milliseconds) / np.array(second.milliseconds)
    assert first.ratio_to(second) == pytest.approx(np.median(ratios))


def test_every_variant_runs_once_a_round_and_each_takes_every_turn():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(variants, CPU, rounds=4, warm_up=2, parts=2)
    rounds = [calls[place : place + 3] for place in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {"a", "b", "c"}
    assert all(len(entry.milliseconds) == 4 for entry in timings.values())


def test_matrix_products_are_counted_as_two_operations_a_multiply_add():
    run, flops = matmul_action([(4, 8, 16), (2, 3, 5)], CPU, torch.float32)
    run()
    assert flops == 2 * 4 * 8 * 16 + 2 * 2 * 3 * 5


def test_prompt_has_the_tokens_that_were_asked_for():
    assert [len(tokenise(prompt_of(count))) for count in (2, 7, 100)] == [2, 7, 100]


def test_rounds_stop_when_the_time_is_up_but_for_the_least_number_of_them():
    timings = interleave({"a": lambda: None}, CPU, rounds=50, seconds=0.0)
    assert len(timings["a"].milliseconds) == 3


def test_what_runs_alone_is_timed_from_one_end_to_the_next():
    timings = sustain(lambda: time.sleep(0.002), CPU, seconds=0.05)
    assert sum(timings.milliseconds) >= 50
    assert min(timings.milliseconds) >= 2
    assert timings.mean == pytest.approx(np.mean(timings.milliseconds))


def test_matrix_products_in_float8_run_and_are_counted_like_others():
    run, flops = float8_matmul_action([(16, 32, 48)], CPU)
    run()
    assert flops == 2 * 16 * 32 * 48


def test_variants_for_a_cpu_need_no_gpu_and_add_one_switch_each():
    names = list(step_variants(compiled=True, capability=None, dtype=torch.bfloat16))
    assert names == [PLAIN, "+ modulation table", "+ text memory", "+ compiled blocks"]
    assert list(decoder_variants(compiled=False, capability=None)) == [
        PLAIN,
        "+ channels last",
        "+ bfloat16",
    ]


@pytest.mark.parametrize("compiled", [False, True])
def test_variants_for_a_gpu_end_with_float8_where_it_multiplies_in_it(compiled):
    steps = step_variants(compiled, (9, 0), torch.bfloat16)
    assert list(steps)[-3:] == ["+ CUDA graph", "+ cuDNN attention", FLOAT8]
    assert steps[FLOAT8] == FastConfig(
        compile=compiled, cuda_graph=True, attention="cudnn", float8=True
    )
    older = step_variants(compiled, (8, 0), torch.bfloat16)
    assert older == {name: fast for name, fast in steps.items() if name != FLOAT8}
    assert step_variants(compiled, (9, 0), torch.float32) == older
    decoders = list(decoder_variants(compiled, capability=(8, 0)).values())
    assert decoders[-1].cudnn_autotune
    assert decoders[-1].compile is compiled


@pytest.mark.parametrize(
    ("milliseconds", "difference", "verdict"),
    [
        (90.0, 0.05, "kept"),
        (100.0, 0.05, "dropped: not faster"),
        (90.0, 0.09, "dropped: differs by more than 8%"),
    ],
)
def test_float8_is_kept_if_it_is_faster_and_within_its_bound(milliseconds, difference, verdict):
    mine, exact = Timings([milliseconds] * 3), Timings([100.0] * 3)
    assert float8_verdict(mine, exact, difference) == verdict
    row = Row(FLOAT8, milliseconds, milliseconds, 1.0, 1.0, verdict=verdict)
    assert [list(column.cells) for column in bench_table([row]).columns][-1] == [verdict]


def test_prompts_are_as_long_as_each_text_encoder_allows():
    assert [most_text_tokens(name) for name in ("ul2", "byt5", "metaclip")] == [128, 256, 77]
    subject = random_subject("demo", None, None, CPU, torch.float32)
    assert subject.max_text_tokens == most_text_tokens("bytes") == 64


def test_full_attention_shares_the_weights_of_windows():
    subject = random_subject("demo", None, 5, CPU, torch.float32)
    whole = full_attention(subject)
    bucket = whole.config.model.buckets[0]
    assert tuple(bucket.window) == whole.config.model.token_grid(bucket)
    for mine, theirs in zip(subject.model.parameters(), whole.model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    assert full_attention(whole) is None


def test_decoder_is_measured_without_a_transformer(monkeypatch):
    monkeypatch.setattr("jobs.bench_subject.StreamDiT", None)
    subject = preset_decoding("streamdit-4b", "demo", CPU)
    assert subject.latent_shape == (8, 64, 64)
    assert subject.chunk_frames == 2
    assert subject.autoencoder.identity.latent_channels == 8


def test_step_reports_rates_of_the_work_that_is_left_and_results_equal_to_plain(tmp_path):
    figures, output = bench(tmp_path, "step", "--text-tokens", "10", "--sustained", "0.1")
    rows = {row["variant"]: row for row in figures["rows"]}
    fast = ["+ modulation table", "+ text memory"]
    alone = [name for name in rows if "alone 0.1 s" in name]
    assert list(rows) == [PLAIN, *fast, FULL_ATTENTION, CEILING, *alone]
    assert len(alone) == 1
    assert rows[alone[0]]["fps"] > 0
    ratios = figures["ratios"]
    assert set(ratios) == {"optimised ÷ plain", "windows ÷ full attention"}
    assert ratios["windows ÷ full attention"] == pytest.approx(rows[FULL_ATTENTION]["versus_plain"])
    assert f"windows ÷ full attention {ratios['windows ÷ full attention']:.3g}" in output
    whole = full_attention(random_subject("demo", None, 10, CPU, torch.float32))
    work = count_flops(whole.config.model, text_tokens=10)["total"]
    row = rows[FULL_ATTENTION]
    assert row["flops_per_second"] == pytest.approx(1e3 * work / row["p50_ms"])
    subject = random_subject("demo", None, 10, CPU, torch.float32)
    assert figures["parameters"] == sum(p.numel() for p in subject.model.parameters())
    assert (figures["height"], figures["width"], figures["frames_per_chunk"]) == (64, 64, 4)
    flops = count_flops(subject.config.model, text_tokens=10)
    work = flops["total"]
    for name, saved in (
        (PLAIN, ()),
        ("+ modulation table", PER_SCHEDULE),
        ("+ text memory", PER_PROMPT),
    ):
        row = rows[name]
        work -= sum(flops[part] for part in saved)
        assert row["flops_per_second"] == pytest.approx(1e3 * work / row["p50_ms"])
        ceiling = rows[CEILING]["flops_per_second"]
        assert row["share_of_ceiling"] == pytest.approx(row["flops_per_second"] / ceiling)
        assert row["fps"] == pytest.approx(4e3 / row["p50_ms"])
        assert row["p50_ms"] <= row["p95_ms"]
        assert row["difference"] < 1e-5
        assert name in output
    assert rows[PLAIN]["difference"] == 0


def test_decoder_and_whole_streams_are_measured_too(tmp_path):
    figures, output = bench(tmp_path, "decode")
    assert "random weights, so no PSNR (give --model, or --autoencoder DIR, for one)" in output
    assert "parameters in" not in output.splitlines()[1]
    rows = {row["variant"]: row for row in figures["rows"]}
    assert rows["+ channels last"]["difference"] < 0.01
    assert 0 < rows["+ bfloat16"]["difference"] < 0.05
    figures, output = bench(tmp_path, "stream", "--no-compile")
    rows = {row["variant"]: row for row in figures["rows"]}
    streams = [PLAIN, "+ fast step", "+ fast decoder", "+ decoding ahead", NO_DECODING]
    assert list(rows) == [*streams, CEILING]
    assert "64×64, 4 frames a chunk" in output
    subject = random_subject("demo", None, None, CPU, torch.float32)
    tokens = {encoder.name: encoder.max_tokens for encoder in subject.config.text_encoders}
    flops = count_flops(subject.config.model, text_tokens=tokens)
    saved = sum(flops[part] for part in (*PER_SCHEDULE, *PER_PROMPT))
    for name in streams:
        row, work = rows[name], flops["total"] - (0 if name == PLAIN else saved)
        assert row["fps"] == pytest.approx(4e3 / row["p50_ms"])
        assert row["flops_per_second"] == pytest.approx(1e3 * work / row["p50_ms"])
        ceiling = rows[CEILING]["flops_per_second"]
        assert row["share_of_ceiling"] == pytest.approx(row["flops_per_second"] / ceiling)


def test_all_is_measured_in_one_process_and_kept_part_by_part(tmp_path, monkeypatch):
    figures, output = bench(tmp_path, "all", "--text-tokens", "10", "--no-compile")
    assert list(figures) == ["step", "stream", "decode"]
    assert [part["command"] for part in figures.values()] == list(figures)
    assert all(f"bench {what}: demo" in output for what in figures)

    def fail(*_):
        raise RuntimeError("the decoder breaks")

    (tmp_path / "figures.json").unlink()
    monkeypatch.setattr("jobs.bench.measure_decoding", fail)
    arguments = ["bench", "all", "--text-tokens", "10", "--rounds", "2", "--no-compile"]
    file = str(tmp_path / "figures.json")
    assert CliRunner().invoke(app, [*arguments, "--json", file]).exit_code != 0
    assert list(json.loads((tmp_path / "figures.json").read_text())) == ["step", "stream"]


def test_streams_run_with_the_step_that_was_fastest(monkeypatch):
    taken = []
    subject = random_subject("demo", None, 10, CPU, torch.float32)
    whole_stream = type(subject).stream

    def stream(self, *arguments, fast, **options):
        taken.append(fast)
        return whole_stream(self, *arguments, fast=fast, **options)

    monkeypatch.setattr(type(subject), "stream", stream)
    measure_streams(subject, Effort(rounds=1), "+ modulation table")
    table_alone = FastConfig(text_memory=False)
    assert taken == [None, table_alone, table_alone, table_alone]


@pytest.mark.parametrize("command", ["step", "decode", "stream"])
def test_a_variant_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, command):
    def breaks(*_, **__):
        raise NotImplementedError("no such kernel\non this device")

    broken = {"step": "+ text memory", "decode": "+ bfloat16", "stream": "+ fast decoder"}[command]
    if command == "step":
        monkeypatch.setattr("streamdit.model.prepared.TextMemories.set", breaks)
        # Of the variants only that one keeps memories from step to step.
        monkeypatch.setattr(
            "jobs.bench_steps.step_variants", lambda *_: {PLAIN: None, broken: FastConfig()}
        )
    else:
        decoder = "jobs.bench_streams.ChunkDecoder" if command == "decode" else None
        target = decoder or "streamdit.stream.ChunkDecoder"
        whole = ChunkDecoder

        def make(autoencoder, device, config=None):
            if config is not None and config.bfloat16 and not config.overlap:
                breaks()
            return whole(autoencoder, device, config)

        monkeypatch.setattr(target, make)
    options = ["--text-tokens", "10"] if command != "decode" else []
    figures, output = bench(tmp_path, command, "--no-compile", *options)
    rows = {row["variant"]: row for row in figures["rows"]}
    assert rows[broken]["verdict"] == "failed: NotImplementedError: no such kernel"
    assert rows[broken]["p50_ms"] is None
    assert rows[PLAIN]["p50_ms"] > 0
    assert "failed: NotImplementedError" in output


def test_plain_must_work(monkeypatch):
    failures = Failures()
    with failures.allowed("+ text memory"):
        raise RuntimeError
    assert failures == {"+ text memory": "RuntimeError: no message"}
    with pytest.raises(RuntimeError), failures.allowed(PLAIN):
        raise RuntimeError
    with pytest.raises(UserError), failures.allowed("+ float8"):
        raise UserError("what the user asked for cannot be had")


def test_a_preset_can_be_measured_with_a_trained_decoder(tmp_path):
    for channels in (4, 16):
        folder = tmp_path / str(channels)
        trained = random_autoencoder("demo", channels, CPU)
        save_autoencoder(trained, folder, training={"psnr": 31.25, "psnr_split": "held_out"})
    figures, output = bench(tmp_path, "decode", "--autoencoder", str(tmp_path / "16"))
    assert figures["autoencoder_trained"]
    assert "PSNR 31.2 dB" in output
    with pytest.raises(UserError, match="makes latents of 4 channels but preset demo takes 16"):
        preset_decoding("demo", str(tmp_path / "4"), CPU)


def test_a_model_with_a_vae_of_diffusers_has_no_quality_to_state(tmp_path):
    """Its directory is diffusers' own and holds no record of training."""
    vae = load_autoencoder(str(write_pipeline(tmp_path)))
    assert vae.identity.kind == "wan"
    facts = decoding_facts(DecodingSubject(vae, (16, 4, 4), 1, CPU), "demo", None)
    assert facts["autoencoder_trained"]
    assert facts["autoencoder_psnr"] is None


def test_rounds_and_seconds_bound_what_is_timed():
    assert Effort().bounds == {"rounds": 30, "warm_up": 0, "seconds": 90.0}
    assert Effort(rounds=5).bounds == {"rounds": 5, "warm_up": 0, "seconds": math.inf}
    assert Effort(rounds=5, seconds=2.0).bounds == {"rounds": 5, "warm_up": 0, "seconds": 2.0}
    assert Effort(seconds=2.0).bounds["seconds"] == 2.0


def test_a_model_directory_is_measured_with_its_own_scheme_and_the_quality_of_its_decoder(tmp_path):
    directory = write_model_directory(tmp_path)
    record = directory / "autoencoder" / "config.json"
    facts = json.loads(record.read_text())
    training = {"psnr": 31.25, "psnr_split": "held_out"}
    record.write_text(json.dumps({**facts, "training": training}))
    figures, output = bench(tmp_path, "step", "--model", str(directory))
    assert figures["scheme"] == {"K": 0, "N": 4, "c": 1, "s": 2, "guidance_scale": 2.0}
    assert "PSNR 31.2 dB" in output
    # A frame's share of a chunk: two steps of two evaluations each make four frames.
    rows = {row["variant"]: row for row in figures["rows"]}
    assert rows[PLAIN]["fps"] == pytest.approx(2e3 / rows[PLAIN]["p50_ms"])
    config = read_model_config(directory)
    tokens = {encoder.name: encoder.max_tokens for encoder in config.text_encoders}
    work = 2 * count_flops(config.model, text_tokens=tokens)["total"]
    assert rows[PLAIN]["flops_per_second"] == pytest.approx(1e3 * work / rows[PLAIN]["p50_ms"])
    figures, output = bench(tmp_path, "decode", "--model", str(directory))
    assert "PSNR 31.2 dB" in output
    assert (figures["height"], figures["frames_per_chunk"]) == (32, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nothing"], "preset 'nothing' does not exist"),
        (["--dtype", "float64"], "--dtype float64 is unknown; choose float32 or bfloat16"),
        (["--model", "somewhere", "--text-tokens", "7"], "--text-tokens is for presets"),
        (["--autoencoder", "nothing"], "no autoencoder preset nothing; choose one of"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, capfd):
    command = "decode" if "--autoencoder" in arguments else "step"
    result = CliRunner().invoke(app, ["bench", command, *arguments])
    assert result.exit_code == 2
    lines = (result.output + capfd.readouterr().err).strip().splitlines()
    assert [line for line in lines if message in line]


@pytest.mark.slow
def test_wans_autoencoder_is_benchmarked_in_its_real_size():
    wan = random_autoencoder("wan", 16, CPU)
    assert sum(p.numel() for p in wan.parameters()) == pytest.approx(127e6, rel=0.01)
    latents = torch.randn(1, 2, 16, 4, 4)
    decoder = ChunkDecoder(wan, CPU)
    assert [decoder.submit(latents).wait().shape for _ in range(2)] == [
        (5, 32, 32, 3),  # a stream's first latent is one frame
        (8, 32, 32, 3),
    ]
    with pytest.raises(UserError, match="Wan's VAE has 16 latent channels but the model 8"):
        random_autoencoder("wan", 8, CPU)


def test_a_training_step_is_measured_with_more_and_more_blocks_recomputed(tmp_path, one_worker):
    figures, text = bench(
        tmp_path, "train", "--batch", "2", "precision=float32", "model.depth=2", "ema_decay=0.9"
    )
    rows = {row["variant"]: row for row in figures["rows"]}
    assert list(rows) == [
        "nothing recomputed",
        "1 of 2 blocks recomputed",
        "2 of 2 blocks recomputed",
        CEILING,
    ]
    config = load_config(TrainConfig, stage="train", preset="demo", overrides=["model.depth=2"])
    tokens = {name: most_text_tokens(name) for name in config.model.text}
    forward = count_flops(config.model, text_tokens=tokens)["total"]
    for name in list(rows)[:3]:
        seconds = rows[name]["p50_ms"] / 1e3
        assert rows[name]["clips_per_second"] == pytest.approx(2 / seconds)
        # Three forward passes, whatever was recomputed.
        assert rows[name]["flops_per_second"] == pytest.approx(2 * 3 * forward / seconds)
        share = rows[name]["flops_per_second"] / rows[CEILING]["flops_per_second"]
        assert rows[name]["share_of_ceiling"] == pytest.approx(share)
    assert (figures["batch"], figures["dtype"]) == (2, "float32")
    assert set(figures["ratios"]) == {"2 of 2 blocks recomputed ÷ nothing recomputed"}
    assert "latents 8×16×8×8, batch of 2" in text
    assert "clips/s" in text


def test_training_that_does_not_fit_is_named_and_the_rest_is_measured(
    tmp_path, one_worker, monkeypatch
):
    step = TrainingSubject.step

    def limited(subject, recomputed):
        run = step(subject, recomputed)

        def out_of_memory():
            run()
            raise torch.OutOfMemoryError("so much")

        return out_of_memory if recomputed < least else run

    monkeypatch.setattr(TrainingSubject, "step", limited)
    settings = ("precision=float32", "model.depth=2")
    least = 1
    figures, text = bench(tmp_path, "train", *settings)
    rows = {row["variant"]: row for row in figures["rows"]}
    assert rows["nothing recomputed"]["verdict"] == "does not fit"
    assert rows["nothing recomputed"]["p50_ms"] is None
    assert rows["1 of 2 blocks recomputed"]["versus_plain"] == 1.0
    assert "does not fit" in text
    least = 3
    result = CliRunner().invoke(app, ["bench", "train", "--preset", "demo", *settings])
    assert result.exit_code == 2
    assert "a batch of 1 does not fit into the device's memory" in result.stderr


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("lora.rank=4", "measures whole models"),
        ("activation_checkpointing=2", "measures every activation_checkpointing"),
    ],
)
def test_what_a_training_step_is_not_measured_with_is_refused(one_worker, setting, told):
    result = CliRunner().invoke(app, ["bench", "train", "--preset", "demo", setting])
    assert result.exit_code == 2
    assert told in result.stderr
