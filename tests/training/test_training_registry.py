"""Registered models: tagged, loaded by alias, damaged ones refused."""

import mlflow
import numpy as np
import pytest
from model_directory import write_model_directory
from safetensors.torch import load_file

import streamdit
from streamdit.errors import UserError
from streamdit.io import read_model_config, save_model_directory
from training.config import TrackingConfig
from training.registry import check_names, find_registered, list_versions, register
from training.tracking import connect


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


@pytest.fixture
def remote(tracking, s3):
    """A store with its artifacts in a bucket."""
    client, _ = connect(tracking)
    client.create_experiment("bucket", artifact_location="s3://videos/mlflow")
    return tracking.model_copy(update={"experiment": "bucket"})


def test_model_of_a_remote_store_is_fetched_once_and_kept_as_the_version_that_it_is(
    tmp_path, remote, s3, monkeypatch
):
    directories = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        lineage = {"step": number}
        directories.append(write_model_directory(tmp_path / str(number), lineage=lineage))
    weights = load_file(directories[1] / "model.safetensors")
    changed = {name: value + 1 for name, value in weights.items()}
    config = read_model_config(directories[1])
    save_model_directory(directories[1], config, changed, directories[1])
    register(directories[0], "tiny", "best", remote)
    register(directories[1], "tiny", None, remote)
    fetch, temporary = mlflow.artifacts.download_artifacts, tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def moving(artifact_uri, **options):
        client, _ = connect(remote)
        client.set_registered_model_alias("tiny", "best", "2")
        return fetch(artifact_uri=artifact_uri, **options)

    # The alias moves between the question what it means and the download.
    with monkeypatch.context() as context:
        context.setattr(mlflow.artifacts, "download_artifacts", moving)
        assert streamdit.load("models:/tiny@best").config.lineage["step"] == 1
    assert streamdit.load("models:/tiny@best").config.lineage["step"] == 2
    (store,) = (tmp_path / "cache" / "models").iterdir()
    assert sorted(path.name.rpartition("-")[0] for path in store.iterdir()) == ["tiny-1", "tiny-2"]
    assert list(temporary.iterdir()) == []

    for entry in s3.list_objects_v2(Bucket="videos")["Contents"]:
        s3.delete_object(Bucket="videos", Key=entry["Key"])
    for number in (1, 2):
        assert streamdit.load(f"models:/tiny/{number}").config.lineage["step"] == number
    (kept,) = store.glob("tiny-1-*/**/model.safetensors")
    kept.write_bytes(kept.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(UserError, match="SHA-256"):
        streamdit.load("models:/tiny/1")


def test_all_models_of_a_store_are_listed_however_many(tmp_path, tracking):
    client, _ = connect(tracking)
    names = {f"model-{number:03d}" for number in range(103)}
    for name in names:
        client.create_registered_model(name)
        client.create_model_version(name, str(tmp_path))
    assert {row["name"] for row in list_versions(tracking)} == names


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
