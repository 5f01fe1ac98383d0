"""`streamdit bench`: figures that follow from the times, and variants that agree with plain."""

import json
import math
import sys

import pytest
import torch
from bench_command import bench
from model_directory import write_model_directory
from typer.testing import CliRunner

from jobs.bench_peer import OUR_BLOCK, PAIR, PEER_BLOCK, TOLERANCE, paired_blocks
from jobs.bench_rows import CEILING, Effort, Failures, Row, float8_verdict, relative_error
from jobs.bench_steps import FULL_ATTENTION
from jobs.bench_streams import NO_DECODING, measure_streams
from jobs.bench_subject import (
    full_attention,
    random_subject,
)
from jobs.bench_table import bench_table
from jobs.bench_variants import FLOAT8, PLAIN
from jobs.cli import app
from jobs.measure import Timings
from streamdit.decoding import ChunkDecoder
from streamdit.denoiser import Denoiser
from streamdit.errors import UserError
from streamdit.io import read_model_config
from streamdit.model.fast import FastConfig, FastVelocity
from streamdit.model.flops import PER_PROMPT, PER_SCHEDULE, count_flops

CPU = torch.device("cpu")


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


def test_step_reports_rates_of_the_work_that_is_left_and_results_equal_to_plain(tmp_path):
    figures, output = bench(tmp_path, "step", "--text-tokens", "10", "--sustained", "0.1")
    rows = {row["variant"]: row for row in figures["rows"]}
    fast = ["+ modulation table", "+ text memory"]
    alone = [name for name in rows if "alone 0.1 s" in name]
    assert list(rows) == [PLAIN, *fast, FULL_ATTENTION, *PAIR, CEILING, *alone]
    assert len(alone) == 1
    assert rows[alone[0]]["fps"] > 0
    ratios = figures["ratios"]
    blocks = "our block ÷ diffusers'"
    assert set(ratios) == {"optimised ÷ plain", "windows ÷ full attention", blocks}
    assert f"{blocks} {ratios[blocks]:.3g}" in output
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
    assert [rows[name]["difference"] for name in (PLAIN, NO_DECODING)] == [0, None]
    assert rows["+ fast step"]["difference"] < 0.01
    for name in ("+ fast decoder", "+ decoding ahead"):
        assert 0 < rows[name]["difference"] < 0.05


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


def test_float8_of_a_stream_is_judged_by_its_velocity(monkeypatch):
    """On a CPU it is run here by hand: it computes the same, and is slow."""
    steps = {PLAIN: None, "exact": FastConfig(), FLOAT8: FastConfig(float8=True)}
    monkeypatch.setattr("jobs.bench_streams.step_variants", lambda *_: steps)
    subject = random_subject("demo", None, 10, CPU, torch.bfloat16)
    rows = {row.variant: row for row in measure_streams(subject, Effort(rounds=3)).rows}
    assert rows[FLOAT8].verdict in ("kept", "dropped: not faster")
    assert rows[FLOAT8].difference > rows["+ decoding ahead"].difference
    assert [name for name, row in rows.items() if row.verdict] == [FLOAT8]
    monkeypatch.setattr("jobs.bench_rows.ERROR_BOUND", 1e-4)
    rows = {row.variant: row for row in measure_streams(subject, Effort(rounds=3)).rows}
    assert rows[FLOAT8].verdict == "dropped: differs by more than 0%"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peers_block_computes_what_ours_does(dtype):
    shape = random_subject("demo", None, 10, CPU, torch.float32).config.model
    blocks = paired_blocks(shape, CPU, dtype)
    found, expected = (blocks[name]().float().flatten() for name in (OUR_BLOCK, PEER_BLOCK))
    assert not found.requires_grad
    assert found.numel() == shape.width * math.prod(shape.token_grid(shape.buckets[0]))
    assert relative_error(found, expected) < TOLERANCE[dtype]


def test_without_diffusers_the_step_is_measured_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    figures, _ = bench(tmp_path, "step", "--text-tokens", "10")
    rows = {row["variant"]: row for row in figures["rows"]}
    assert "ModuleNotFoundError" in rows[PEER_BLOCK]["verdict"]
    assert rows[PLAIN]["p50_ms"] > 0
    assert "our block ÷ diffusers'" not in figures["ratios"]


def test_a_variant_that_fails_while_it_is_timed_is_left_out_and_what_came_before_is_kept(
    tmp_path, monkeypatch
):
    step, calls = Denoiser.step, []

    def breaks_late(denoiser):
        if isinstance(denoiser._velocity_at, FastVelocity):
            fast = denoiser._velocity_at.config
            calls.append(fast)
            if fast == FastConfig() and calls.count(fast) > 3:  # in the second round
                raise RuntimeError("the device is lost")
        return step(denoiser)

    monkeypatch.setattr(Denoiser, "step", breaks_late)
    figures, _ = bench(tmp_path, "step", "--text-tokens", "10")
    rows = {row["variant"]: row for row in figures["rows"]}
    assert rows["+ text memory"]["verdict"] == "failed: RuntimeError: the device is lost"
    assert rows["+ modulation table"]["p50_ms"] > 0
    assert set(figures["ratios"]) >= {"optimised ÷ plain", "windows ÷ full attention"}


def test_figures_are_kept_before_what_runs_alone(tmp_path, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.bench_steps.sustained_rows", cut_off)
    file = tmp_path / "figures.json"
    arguments = ("bench", "all", "--text-tokens", "10", "--rounds", "1", "--json", str(file))
    assert CliRunner().invoke(app, arguments).exit_code != 0
    rows = json.loads(file.read_text())["step"]["rows"]
    assert {PLAIN, CEILING, *PAIR} <= {row["variant"] for row in rows}
