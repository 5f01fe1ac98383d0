"""`streamdit dataset` as a person uses it."""

import json
import os

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.lock import LOCK_FILE, writing


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["dataset", *map(str, arguments)])


def refusal(result):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_the_group_explains_its_commands(invoke):
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("show", "verify", "repair", "remove"):
        assert name in result.stdout


@pytest.mark.parametrize("name", ["show", "verify", "repair"])
def test_a_folder_without_dataset_is_one_line(invoke, tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert "holds no sources" in refusal(invoke(name, "empty"))


def test_removing_from_a_folder_without_dataset_is_one_line(invoke, tmp_path):
    assert "has no source a.mp4" in refusal(invoke("remove", "nowhere", "a.mp4"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "ingest {videos} --out {data} --only curate",
        "select {data} True",
        "dataset repair {data}",
        "dataset remove {data} a.mp4",
        "demo --out {demo}",
        "bench sprites --out {demo}",
    ],
)
def test_commands_that_write_wait_for_each_other(tmp_path, monkeypatch, arguments):
    """Two that change a dataset at once would undo each other's index."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    given = arguments.format(videos="videos", data="data", demo="demo").split()
    data = "demo/dataset" if given[-1] == "demo" else "data"
    with writing(data, "streamdit ingest"):
        said = refusal(CliRunner().invoke(app, given))
        assert f"`streamdit ingest` (process {os.getpid()} on" in said
        assert [path.name for path in (tmp_path / data).iterdir()] == [LOCK_FILE]


@pytest.fixture
def curated(tmp_path, monkeypatch):
    """Two videos, curated without Ray."""
    from evaluation.sprites import SpriteWorldConfig, make_world
    from jobs.config import load_config
    from pipeline import curate as module
    from pipeline.config import IngestConfig

    make_world(tmp_path / "videos", SpriteWorldConfig(videos=2, shots_per_video=1, size=64))

    def run_in_a_loop(tasks, stage, **_):
        for task in tasks:
            for row in stage(task):
                yield json.loads(row["counters"])

    monkeypatch.setattr(module, "run_units", run_in_a_loop)
    config = load_config(IngestConfig, stage="ingest", preset="demo")
    module.curate([str(tmp_path / "videos")], tmp_path / "data", config)
    return tmp_path / "data"


def test_show_tells_what_is_there_and_writes_the_page(invoke, curated):
    result = invoke("show", "data", "--report", "page.html")
    assert result.exit_code == 0, result.output
    assert "curate     done  2 videos" in result.stdout
    assert "none yet: not ready for training" in result.stdout
    assert "page  page.html" in result.stdout
    assert (curated.parent / "page.html").read_text().startswith("<!doctype html>")


def test_show_prints_one_clip_and_writes_it_as_a_picture(invoke, curated):
    from pipeline.schema import read_clips

    clip = read_clips(curated).to_pylist()[0]
    result = invoke("show", "data", clip["clip_id"][:6], "--picture", "strip.png")
    assert result.exit_code == 0, result.output
    assert clip["clip_id"] in result.stdout
    assert clip["uri"] in result.stdout
    assert (curated.parent / "strip.png").read_bytes().startswith(b"\x89PNG")
    assert "has no clip zzz" in refusal(invoke("show", "data", "zzz"))


def test_verify_fails_on_damage_and_names_the_remedy(invoke, curated):
    assert invoke("verify", "data").exit_code == 0
    table = sorted((curated / "clips").glob("*.parquet"))[0]
    table.write_bytes(table.read_bytes()[:-1])
    result = invoke("verify", "data")
    assert result.exit_code == 1
    assert table.name in result.stdout
    assert "streamdit dataset repair data" in result.stderr


def test_remove_tells_what_went(invoke, curated):
    name = sorted((curated.parent / "videos").glob("*.mp4"))[0].name
    result = invoke("remove", "data", name)
    assert result.exit_code == 0, result.output
    assert name in result.stdout
    assert "curate     done  1 videos" in invoke("show", "data").stdout
