"""Registered models: tagged, loaded by alias, damaged ones refused."""

import mlflow
import numpy as np
import pytest
from model_directory import write_model_directory

import streamdit
from streamdit.errors import UserError
from streamdit.io import read_model_config
from training.config import TrackingConfig
from training.registry import check_names, find_registered, list_versions, register


@pytest.fixture
def tracking(tmp_path):
    return TrackingConfig(directory=str(tmp_path / "store"))


def test_registered_model_streams_by_alias_like_its_directory(tmp_path, tracking):
    directory = write_model_directory(tmp_path)
    registered = register(directory, "tiny", "best", tracking, {"colour": 0.9})
    assert registered.uri == "models:/tiny@best"
    chunk = next(streamdit.load(registered.uri).stream("a red circle", seed=4))
    expected = next(streamdit.load(directory).stream("a red circle", seed=4))
    assert np.array_equal(chunk.frames, expected.frames)

    found = find_registered("tiny", "best", tracking)
    assert found.version == registered.version
    tags = {"K": "0", "N": "4", "c": "1", "s": "2", "score.colour": "0.9"}
    assert tags.items() <= found.tags.items()
    assert found.tags["weights_sha256"] == read_model_config(directory).weights_sha256


def test_alias_moves_to_the_newest_version(tmp_path, tracking):
    directory = write_model_directory(tmp_path)
    first = register(directory, "tiny", "best", tracking)
    second = register(directory, "tiny", "best", tracking)
    assert int(second.version) == int(first.version) + 1
    assert find_registered("tiny", "best", tracking).version == second.version
    assert find_registered("tiny", "other", tracking) is None
    assert find_registered("nobody", "best", tracking) is None


def test_pyfunc_model_answers_a_table_of_prompts(tmp_path, tracking):
    import pandas as pd

    registered = register(write_model_directory(tmp_path), "tiny", "best", tracking)
    model = mlflow.pyfunc.load_model(registered.uri)
    table = pd.DataFrame({"prompt": ["a red circle", "a blue square"]})
    videos = model.predict(table, params={"frames": 6, "seed": 1})
    assert [video.shape for video in videos] == [(6, 32, 32, 3)] * 2


def test_damaged_model_is_not_registered(tmp_path, tracking):
    directory = write_model_directory(tmp_path)
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\1\2\3")
    with pytest.raises(UserError, match="SHA-256"):
        register(directory, "tiny", "best", tracking)


def test_unknown_alias_is_one_line_that_says_where_to_look(tracking, tmp_path):
    register(write_model_directory(tmp_path), "tiny", "best", tracking)
    with pytest.raises(UserError, match="models:/tiny@nobody cannot be loaded") as caught:
        streamdit.load("models:/tiny@nobody")
    assert "MLFLOW_TRACKING_URI" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_cannot_be_are_refused_before_a_version_is_made(tmp_path, tracking):
    directory = write_model_directory(tmp_path)
    for name, alias, message in (
        ("tiny", "latest", "reserved by MLflow"),
        ("tiny", "v2", "reserved by MLflow"),
        ("tiny", "so good", "letters, digits"),
        ("a/b", "best", "model name"),
        ("", "best", "model name"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            register(directory, name, alias, tracking)
        assert "\n" not in str(caught.value)
    assert list_versions(tracking) == []


def test_mlflow_reserves_what_is_refused_here_and_nothing_that_is_accepted():
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import (
        _validate_model_alias_name,
        _validate_model_alias_name_reserved,
    )

    def refused(check, *names):
        try:
            check(*names)
        except (MlflowException, UserError):
            return True
        return False

    for alias in ("latest", "LATEST", "v1", "V12", "a b", "a.b", "best", "v", "v1a", "a_b-c", "1"):
        theirs = refused(_validate_model_alias_name, alias) or refused(
            _validate_model_alias_name_reserved, alias
        )
        assert refused(check_names, "tiny", alias) == theirs, alias
