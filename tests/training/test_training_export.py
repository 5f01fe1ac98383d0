"""Checkpoints as model directories: any step, averaged or not, whatever saved them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_dataset import train_settings, write_dataset
from safetensors.torch import load_file, save_file
from training_runs import train, train_together

from jobs.cli import app
from streamdit.errors import UserError
from streamdit.io import load_model, read_model_config
from streamdit.model import build_dit
from training.checkpoint import find_checkpoints
from training.config import TrainConfig
from training.export import RECORD_FILE, export_checkpoint
from training.loop import train_loop  # noqa: F401  (its import is slow; not part of a test's time)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A finished run of four steps that kept a checkpoint of each."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(dataset, out, steps=4, checkpoint={"every": 1, "keep": 4}, validation={"samples": 0})
    return out


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_equal(one, two):
    assert set(one) == set(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_finished_run_holds_averaged_and_last_weights(run, tmp_path):
    assert export_checkpoint(run, tmp_path / "ema").step == 4
    assert export_checkpoint(run, tmp_path / "raw", weights="raw").step == 4
    assert_equal(weights(run / "model"), weights(tmp_path / "ema"))
    assert_equal(weights(run / "model-raw"), weights(tmp_path / "raw"))
    assert read_model_config(run / "model") == read_model_config(tmp_path / "ema")
    model, config = load_model(tmp_path / "raw")
    assert_equal(dict(model.state_dict()), weights(run / "model-raw"))
    assert config.lineage["step"] == 4
    assert (tmp_path / "raw" / "autoencoder").is_dir()


def test_averaged_weights_are_the_average_of_the_raw_ones(run, tmp_path):
    settings = TrainConfig.model_validate(train_settings())
    average = dict(build_dit(settings.model, settings.seed).state_dict())
    for step in (1, 2, 3, 4):
        export_checkpoint(run, tmp_path / str(step), step, "raw")
        raw, updates = weights(tmp_path / str(step)), step - 1
        decay = min(settings.ema_decay, (1 + updates) / (10 + updates))
        average = {name: decay * average[name] + (1 - decay) * raw[name] for name in average}
    found = weights(run / "model")
    for name in average:
        torch.testing.assert_close(found[name], average[name], rtol=1e-5, atol=1e-7)
    assert any((found[name] - raw[name]).abs().max() > 1e-4 for name in found)


def test_earlier_checkpoint_is_what_a_shorter_run_ends_with(dataset, run, tmp_path):
    short = tmp_path / "short"
    train(dataset, short, steps=2, validation={"samples": 0})
    export_checkpoint(run, tmp_path / "out", step=2, weights="raw")
    assert_equal(weights(tmp_path / "out"), weights(short / "model-raw"))
    assert read_model_config(tmp_path / "out").lineage["step"] == 2


def test_mistakes_are_told_with_what_there_is(run, dataset, tmp_path):
    with pytest.raises(
        UserError, match=r"no complete checkpoint of step 7; choose from 1, 2, 3, 4"
    ):
        export_checkpoint(run, tmp_path / "out", step=7)
    with pytest.raises(UserError, match=f"{dataset} is no directory of a run: it has no run.json"):
        export_checkpoint(dataset, tmp_path / "out")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("kept")
    with pytest.raises(UserError, match="precious is there and is no model directory"):
        export_checkpoint(run, precious)
    assert (precious / "thesis.txt").read_text() == "kept"
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_gives_way_to_the_one_before_or_is_refused_if_named(
    run, tmp_path, caplog
):
    copy, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out"
    newest, before = find_checkpoints(copy / "checkpoints")[:2]
    flip_a_byte(newest / "ema-rank00000.pt")
    assert export_checkpoint(copy, out).step == 3
    assert f"{newest} is damaged (the content of ema-rank00000.pt has changed)" in caplog.text
    export_checkpoint(run, tmp_path / "expected", step=3)
    assert_equal(weights(out), weights(tmp_path / "expected"))
    with pytest.raises(UserError, match=r"step-00000004 is damaged \(the content .* has changed\)"):
        export_checkpoint(copy, out, step=4)

    # What only the weights of the step are read from does not matter to the averaged ones.
    (state,) = before.glob("deepspeed/*optim_states.pt")
    flip_a_byte(state)
    assert export_checkpoint(copy, out, weights="ema").step == 3
    assert export_checkpoint(copy, out, weights="raw").step == 2
    shutil.rmtree(out)
    for folder in find_checkpoints(copy / "checkpoints"):
        (folder / "ema-rank00000.pt").unlink()
    with pytest.raises(UserError, match=f"no checkpoint in {copy} can be used"):
        export_checkpoint(copy, out)
    assert not out.exists()


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_run_without_average_exports_raw_weights_only(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    record = json.loads((run / RECORD_FILE).read_text())
    (copy / RECORD_FILE).write_text(json.dumps(record | {"ema": False}))
    with pytest.raises(UserError, match=r"keeps no averaged weights .* export --weights raw"):
        export_checkpoint(copy, tmp_path / "out", weights="ema")
    export_checkpoint(copy, tmp_path / "out")
    assert_equal(weights(tmp_path / "out"), weights(run / "model-raw"))


def test_command_exports_and_says_what_and_what_next(run, tmp_path):
    from typer.testing import CliRunner

    out = tmp_path / "out"
    arguments = ["export", str(run), "--out", str(out), "--step", "3", "--weights", "raw"]
    result = CliRunner().invoke(app, arguments, prog_name="streamdit")
    assert result.exit_code == 0, result.output
    assert f"model: {out} (step 3, saved by 1 workers)" in result.stderr
    assert "next: streamdit generate" in result.stderr
    assert read_model_config(out).lineage["step"] == 3
    result = CliRunner().invoke(app, [*arguments[:-1], "best"], prog_name="streamdit")
    assert result.exit_code == 2
    assert result.stderr == "error: --weights best is not known; choose ema or raw\n"


MEASURE = """
import sys
from pathlib import Path
import training.loop
from training.export import export_checkpoint

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = kilobytes("VmRSS")
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stage", [1, 3])
def test_export_needs_memory_for_two_copies_of_the_weights(stage, dataset, tmp_path):
    model = train_settings()["model"] | {"width": 512, "depth": 6, "heads": 8, "ffn_width": 2048}
    train(
        dataset,
        tmp_path / "run",
        steps=1,
        global_batch=1,
        model=model,
        zero_stage=stage,
        validation={"samples": 0},
    )
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size > 100e6
    assert float(result.stdout.splitlines()[-1]) < 2 * size + 20e6


@pytest.mark.slow
def test_shards_of_several_workers_and_stages_are_what_deepspeed_makes_of_them(dataset, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    runs = [
        {"dataset": dataset, "out": tmp_path / str(stage), "steps": 2, "zero_stage": stage}
        for stage in (1, 2, 3)
    ]
    train_together(tmp_path, runs)
    for run in runs:
        folder = find_checkpoints(run["out"] / "checkpoints")[0]
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), "deepspeed")
        export_checkpoint(run["out"], tmp_path / "out", weights="raw")
        assert_equal(weights(tmp_path / "out"), dict(theirs))


def test_what_was_not_written_as_it_is_in_memory_is_no_model(run, tmp_path, monkeypatch):
    def failing_disk(tensors, path, metadata):
        name = next(iter(tensors))
        save_file({**tensors, name: tensors[name] + 1e-3}, path, metadata)

    monkeypatch.setattr("training.export.save_file", failing_disk)
    with pytest.raises(RuntimeError, match="was not written as it is in memory"):
        export_checkpoint(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.iterdir())
