"""`streamdit generate` and `streamdit register` on a small model."""

import numpy as np
import pytest
import torch
from model_directory import write_model_directory
from PIL import Image
from typer.testing import CliRunner

import streamdit
from evaluation.sheets import read_video, write_video
from jobs.bench_variants import FLOAT8, decoder_variants, step_variants
from jobs.cli import app
from jobs.generate import (
    PromptChange,
    compiled_stream,
    parse_prompt,
    read_start,
    stream_frames,
)
from jobs.sources import read_source
from streamdit.decoding import to_uint8
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
        *("generate", model_dir, "--prompt", "x", "--scheme", "c=3", "--out", tmp_path / "v.mp4")
    )
    assert result.exit_code == 2
    assert "chunk_frames 3 does not divide" in result.output
    assert "[1, 2, 4]" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("option", "value"),
    [("--scheme", "c=0"), ("--scheme", "q=1"), ("--guidance", -1), ("--start", "jump")],
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


@pytest.mark.slow
def test_fast_frames_differ_by_rounding_and_change_prompts_at_the_same_frame(model_dir):
    model = streamdit.load(model_dir)
    changes = [PromptChange(0, "a red circle"), PromptChange(16, "a blue square")]
    chunks = {
        fast: np.concatenate([c.frames for c in stream_frames(model, changes, 32, 0, fast=fast)])
        for fast in (False, True)
    }
    difference = np.abs(chunks[True].astype(int) - chunks[False].astype(int))
    assert difference.max() <= 2


def test_later_prompts_must_say_when_they_begin():
    assert parse_prompt("a circle", 16, first=True) == PromptChange(0, "a circle")
    assert parse_prompt("64: a square", 16, first=False) == PromptChange(64, "a square")
    assert parse_prompt("2.5s: a square", 16, first=False) == PromptChange(40, "a square")
    assert parse_prompt("note: a square", 16, first=True) == PromptChange(0, "note: a square")
    for text in ("a square", "2.5: a square"):
        with pytest.raises(UserError, match="write FRAME:PROMPT or SECONDSs:PROMPT"):
            parse_prompt(text, 16, first=False)


def source_video(path, frames=40, size=48):
    rows = np.arange(size, dtype=np.uint8)[None, :, None, None] * 4
    shift = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 3
    pictures = np.broadcast_to(rows + shift, (frames, size, size, 3))
    return write_video(path, np.ascontiguousarray(pictures), 16.0)


def test_video_at_strength_zero_is_what_the_autoencoder_makes_of_it(model_dir, tmp_path):
    source, out = source_video(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    result = run(
        *("generate", model_dir, "--prompt", "x", "--video", source, "--strength", 0),
        *("--frames", 16, "--out", out),
    )
    assert result.exit_code == 0, result.output
    model = streamdit.load(model_dir)
    latents = model.latents(read_source(source, model, 16))
    expected = to_uint8(model.autoencoder.decode(model.autoencoder.denormalise(latents))[0][0])
    same = read_video(write_video(tmp_path / "expected.mp4", expected, 16.0)).astype(float)
    assert np.abs(read_video(out) - same).mean() < 1


def test_last_frames_are_made_beside_the_video_that_goes_on_behind_them(model_dir, tmp_path):
    model = streamdit.load(model_dir)
    for there, latents in ((40, 8), (24, 6)):  # 16 frames asked for, 16 of a buffer behind them
        source = source_video(tmp_path / f"{there}.mp4", there)
        guide, _ = read_start(model, 16, None, source, None, 0.5)
        assert guide.latents.shape[1] == latents


def test_image_begins_a_stream(model_dir, tmp_path):
    picture, out = tmp_path / "in.png", tmp_path / "out.mp4"
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(picture)
    options = ("--image", picture, "--strength", 0.5, "--frames", 8, "--out", out)
    result = run("generate", model_dir, "--prompt", "x", *options)
    assert result.exit_code == 0, result.output
    assert read_video(out).shape == (8, 32, 32, 3)


def test_starts_that_contradict_or_are_no_pictures_are_one_line(model_dir, tmp_path):
    source = source_video(tmp_path / "in.mp4")
    (tmp_path / "no.png").write_text("no")
    for options, message in (
        (("--image", source, "--video", source), "give one of them"),
        (("--strength", 0.5), "add --image FILE or --video FILE"),
        (("--image", tmp_path / "no.png"), "cannot be read as a picture"),
        (("--video", tmp_path / "no.png"), "cannot be read as video"),
        (("--extend", source), "K=0 has no reference frames"),
    ):
        result = run("generate", model_dir, "--prompt", "x", *options)
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output


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


def test_fast_takes_what_bench_adds_up_to_on_a_gpu():
    steps, decoder = compiled_stream(torch.device("cuda"))
    exact = step_variants(True, (9, 0), torch.bfloat16)
    exact.pop(FLOAT8)
    assert steps == list(exact.values())[-1]
    assert decoder == list(decoder_variants(True, (9, 0)).values())[-1]
