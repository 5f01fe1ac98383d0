"""`streamdit convert`: an open model on disk becomes a model directory, or one line says why."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner
from wan_pipeline import write_pipeline

from jobs.cli import app
from streamdit.io import read_model_config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("wan"))


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_options_become_the_bucket_of_the_model(pipeline, tmp_path):
    options = ("--frames", 13, "--size", "32x64", "--window", "2x2x4", "--fps", 12)
    result = convert(pipeline, "--out", tmp_path / "m", *options, "--precision", "bfloat16")
    assert result.exit_code == 0, result.output
    config = read_model_config(tmp_path / "m")
    bucket = config.model.buckets[0]
    assert (bucket.frames, bucket.height, bucket.width) == (4, 4, 8)
    assert bucket.window == (2, 2, 4)
    assert config.fps == 12
    assert "13 frames of 32×64, 4 latents, windows of 2×2×4 tokens" in result.stderr
    assert f"--from {tmp_path / 'm'}" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "32"), "--size '32' is not 2 numbers; write it like 480x832"),
        (("--window", "2x2"), "--window '2x2' is not 3 numbers; write it like 8x15x26"),
        (("--size", "30x64"), "size 30x64 is not a multiple of 16"),
    ],
)
def test_impossible_options_are_refused_in_one_line(pipeline, tmp_path, options, message):
    result = convert(pipeline, "--out", tmp_path / "m", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "m").exists()


def test_existing_directory_is_left_alone(pipeline, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("kept")
    result = convert(pipeline, "--out", tmp_path / "m")
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert (tmp_path / "m" / "mine").read_text() == "kept"
