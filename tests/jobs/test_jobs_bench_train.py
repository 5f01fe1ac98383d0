"""`streamdit bench train`: rates that follow from the times, and what does not fit."""

import pytest
import torch
from bench_command import bench
from typer.testing import CliRunner

from jobs.bench_rows import CEILING
from jobs.bench_subject import (
    most_text_tokens,
)
from jobs.bench_train import COMPILED, TrainingSubject
from jobs.cli import app
from jobs.config import load_config
from streamdit.model.flops import count_flops
from training.config import TrainConfig

CPU = torch.device("cpu")


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

    def limited(subject, setting):
        run = step(subject, setting)

        def out_of_memory():
            run()
            raise torch.OutOfMemoryError("so much")

        return out_of_memory if setting.recomputed < least else run

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
        ("compile_blocks=true", "give --compile"),
    ],
)
def test_what_a_training_step_is_not_measured_with_is_refused(one_worker, setting, told):
    result = CliRunner().invoke(app, ["bench", "train", "--preset", "demo", setting])
    assert result.exit_code == 2
    assert told in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_step_is_also_measured_compiled(tmp_path, one_worker):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    figures, _ = bench(tmp_path, "train", "--compile", "precision=float32", "model.depth=1")
    rows = {row["variant"]: row for row in figures["rows"]}
    names = ["nothing recomputed", "1 of 1 blocks recomputed"]
    assert list(rows) == [*names, *(f"{name}, compiled" for name in names), CEILING]
    assert all(row["p50_ms"] > 0 for row in rows.values())
    assert counters["stats"]["unique_graphs"] > 0
    assert "nothing recomputed, compiled ÷ nothing recomputed" in figures["ratios"]
    result = CliRunner().invoke(app, ["bench", "train", "--compile", "zero_stage=3"])
    assert result.exit_code == 2
    assert "set zero_stage=2" in result.stderr


def test_eager_steps_are_measured_where_blocks_do_not_compile(tmp_path, one_worker, monkeypatch):
    def breaks():
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("streamdit.model.dit.compiled_block", breaks)
    figures, _ = bench(tmp_path, "train", "--compile", "precision=float32", "model.depth=1")
    rows = {row["variant"]: row for row in figures["rows"]}
    assert rows["nothing recomputed"]["p50_ms"] > 0
    assert rows[COMPILED]["verdict"] == "failed: RuntimeError: no compiler here"
    assert "nothing recomputed, compiled" not in rows
