"""`streamdit generate` and `streamdit register` on a small model."""

import numpy as np
import pytest
from model_directory import write_model_directory
from typer.testing import CliRunner

import streamdit
from evaluation.sheets import read_video
from jobs.cli import app
from jobs.generate import PromptChange, parse_prompt, stream_frames
from streamdit.errors import UserError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("model"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generated_file_has_the_asked_frames_and_size(model_dir, tmp_path):
    out, sheet = tmp_path / "video.mp4", tmp_path / "sheet.png"
    result = run(
        *("generate", model_dir, "--prompt", "a red circle", "--prompt", "8:a blue square"),
        *("--out", out, "--frames", 18, "--upscale", 2, "--sheet", sheet),
    )
    assert result.exit_code == 0, result.output
    video = read_video(out)
    assert video.shape == (18, 64, 64, 3)
    assert sheet.stat().st_size > 0


def test_scheme_outside_the_training_mix_is_refused_with_the_list(model_dir, tmp_path):
    result = run(
        *("generate", model_dir, "--prompt", "x", "--chunk-frames", 3, "--out", tmp_path / "v.mp4")
    )
    assert result.exit_code == 2
    assert "chunk_frames 3 does not divide" in result.output
    assert "[1, 2, 4]" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("option", "value"), [("--chunk-frames", 0), ("--micro-steps", -1), ("--guidance", -1)]
)
def test_impossible_numbers_are_usage_errors(model_dir, option, value):
    result = run("generate", model_dir, "--prompt", "x", option, value)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_unknown_device_is_one_line(model_dir):
    result = run("generate", model_dir, "--prompt", "x", "--device", "abacus")
    assert result.exit_code == 2
    assert "device abacus cannot be used" in result.output


def test_missing_model_is_one_line(tmp_path):
    result = run("generate", tmp_path / "none", "--prompt", "x")
    assert result.exit_code == 2
    assert "is no model directory" in result.output


def test_prompt_changes_take_hold_at_their_frame(model_dir):
    model = streamdit.load(model_dir)
    changes = [PromptChange(0, "a red circle"), PromptChange(8, "a blue square")]
    chunks = list(stream_frames(model, changes, frames=20, seed=0))
    assert [(chunk.first_frame, chunk.prompt_version) for chunk in chunks] == [
        (0, 0),
        (4, 0),
        (8, 1),
        (12, 1),
        (16, 1),
    ]
    plain = list(stream_frames(model, changes[:1], frames=20, seed=0))
    assert np.array_equal(plain[1].frames, chunks[1].frames)
    assert not np.array_equal(plain[2].frames, chunks[2].frames)


def test_later_prompts_must_say_when_they_begin():
    assert parse_prompt("a circle", first=True) == PromptChange(0, "a circle")
    assert parse_prompt("64: a square", first=False) == PromptChange(64, "a square")
    assert parse_prompt("note: a square", first=True) == PromptChange(0, "note: a square")
    with pytest.raises(UserError, match="write FRAME:PROMPT"):
        parse_prompt("a square", first=False)


def test_registered_model_is_found_by_the_next_command(model_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = tmp_path / "store"
    result = run(
        *("register", model_dir, "--name", "tiny", "--alias", "best", "--tracking-dir", store)
    )
    assert result.exit_code == 0, result.output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    out = tmp_path / "video.mp4"
    result = run("generate", "models:/tiny@best", "--prompt", "x", "--out", out, "--frames", 4)
    assert result.exit_code == 0, result.output
    assert len(read_video(out)) == 4
