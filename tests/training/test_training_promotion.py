"""What a registered version says about itself, and when an alias moves to it."""

import json
import re
from types import SimpleNamespace
from unittest import mock

import pytest
from model_directory import write_model_directory
from safetensors.torch import load_file
from typer.testing import CliRunner

import streamdit
from jobs.cli import app
from jobs.register import local_text_encoders
from streamdit.config import DistillationRecord, DistilledScheme, SamplingConfig
from streamdit.errors import UserError
from streamdit.io import read_model_config, save_model_directory
from training.config import TrackingConfig
from training.promotion import Promotion, move_alias
from training.registry import (
    find_registered,
    list_versions,
    register,
    version_tags,
)
from training.revision import git_revision
from training.tracking import connect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher's and a student's model directory."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "teacher").mkdir()
    teacher = write_model_directory(
        folder / "teacher", lineage={"dataset_fingerprint": "data-1", "run_id": "gone", "step": 9}
    )
    record = DistillationRecord(
        schemes=(DistilledScheme(chunk_frames=2),),
        starts=("text-to-video",),
        teacher_sha256=read_model_config(teacher).weights_sha256,
        teacher_micro_steps=16,
        teacher_guidance_scale=3.0,
    )
    (folder / "student").mkdir()
    sampling = SamplingConfig(chunk_frames=2, micro_steps=1)
    write_model_directory(folder / "student", distilled=record, sampling=sampling)
    return folder


@pytest.fixture
def tracking(tmp_path):
    return TrackingConfig(directory=str(tmp_path / "store"))


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


def test_alias_moves_only_to_a_better_version(folder, tracking):
    model, better = folder / "teacher" / "model", Promotion("colour")
    # Scores are compared to the last digit: the fourth is a draw.
    for score, holder in ((0.5, "1"), (0.4, "1"), (0.6123456789, "3"), (0.6123456789, "3")):
        made = register(model, "tiny", "best", tracking, {"colour": score}, promotion=better)
        assert find_registered("tiny", "best", tracking).version == holder
        assert (made.alias == "best") == (made.version == holder)
    assert made.note == "colour 0.612346 is not higher than 0.612346 of version 3"
    with pytest.raises(UserError, match="metric shape is not among the scores"):
        register(model, "tiny", "best", tracking, {"colour": 1.0}, promotion=Promotion("shape"))
    for scores, message in (
        ({"colour": float("nan")}, "score colour is nan, not a finite number"),
        ({"colour": 1.0, "shape": float("-inf")}, "score shape is -inf"),
        ({"colour": 1.0, "": 3.0}, "a score of 3 has no name; give NAME=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            register(model, "tiny", "best", tracking, scores, promotion=better)
    assert len(list_versions(tracking, "tiny")) == 4


def test_of_two_that_ask_at_once_the_better_one_has_the_alias(folder, tracking):
    """The second registers between the first's look at the holder and its own move."""
    model, better = folder / "teacher" / "model", Promotion("colour")
    register(model, "race", "best", tracking, {"colour": 0.8}, promotion=better)
    judge, rivals = Promotion.judge, [0.95]

    def judging(self, new, old, holder):
        found = judge(self, new, old, holder)
        if rivals:
            score = rivals.pop()
            register(model, "race", "best", tracking, {"colour": score}, promotion=better)
        return found

    with mock.patch.object(Promotion, "judge", judging):
        made = register(model, "race", "best", tracking, {"colour": 0.9}, promotion=better)
    assert (made.version, made.alias) == ("2", None)
    assert made.note == "version 3, registered meanwhile, is better"
    assert find_registered("race", "best", tracking).version == "3"
    assert move_alias(connect(tracking)[0], "race", "best", "3", {"colour": 0.95}, better) == (
        True,
        "given by another that asked at the same time",
    )


def test_a_tag_that_is_no_score_stops_nobody(folder, tracking):
    model, better = folder / "teacher" / "model", Promotion("colour")
    register(model, "tagged", "best", tracking, {"colour": 0.5, "shape": 0.4})
    connect(tracking)[0].set_model_version_tag("tagged", "1", "score.colour", "n/a")
    (row,) = list_versions(tracking, "tagged")
    assert row["scores"] == {"shape": 0.4}
    made = register(model, "tagged", "best", tracking, {"colour": 0.1}, promotion=better)
    assert (made.alias, made.note) == ("best", "version 1 has no score colour to beat")


def test_loading_from_a_store_of_this_machine_writes_nothing_there(folder, tracking, tmp_path):
    register(folder / "teacher" / "model", "local", "best", tracking)
    artifacts = [path for path in (tmp_path / "store").rglob("*") if path.suffix != ".db"]
    streamdit.load("models:/local@best")
    assert [path for path in (tmp_path / "store").rglob("*") if path.suffix != ".db"] == artifacts


def test_better_is_higher_unless_lower_is_asked_for_and_a_draw_is_not_better():
    higher, lower = Promotion("colour"), Promotion("flicker", lower_is_better=True)
    assert higher.judge(0.5, "0.5", "version 1")[0] is False
    assert higher.judge(0.6, "0.5", "version 1")[0] is True
    assert lower.judge(0.6, "0.5", "version 1") == (
        False,
        "flicker 0.6 is not lower than 0.5 of version 1",
    )
    assert lower.judge(0.4, "0.5", "version 1")[0] is True
    for nothing in (None, "nan"):
        told = lower.judge(9.0, nothing, "version 1")
        assert told == (True, "version 1 has no score flicker to beat")


def test_distilled_version_names_the_registered_teacher(folder, tracking):
    teacher = register(folder / "teacher" / "model", "teacher", "best", tracking)
    student = register(folder / "student" / "model", "student", "best", tracking)
    assert student.tags["teacher"] == f"teacher/{teacher.version}"
    assert student.tags["teacher_s"] == "16"
    expected = {"K": "0", "N": "2", "c": "2", "s": "1", "guidance_scale": "1"}
    assert expected.items() <= student.tags.items()
    assert teacher.tags["dataset_fingerprint"] == "data-1"
    assert teacher.tags["git_revision"] == git_revision()


def test_registered_revision_is_that_of_the_code_that_trained(folder):
    config = read_model_config(folder / "teacher" / "model")
    trained = config.model_copy(update={"lineage": config.lineage | {"git_revision": "abc"}})
    assert version_tags(trained, {})["git_revision"] == "abc"
    assert version_tags(config, {})["git_revision"] == git_revision()


def test_artifact_has_a_card_with_a_sample_video_and_no_pickle(folder, tmp_path):
    store = tmp_path / "store"
    result = run(
        *("register", folder / "student" / "model", "--name", "tiny", "--alias", "best"),
        *("--score", "colour=0.75", "--prompt", "a red circle", "--sample-frames", 12),
        *("--tracking-dir", store),
    )
    assert result.exit_code == 0, result.output
    (card,) = store.rglob("README.md")
    text = card.read_text()
    assert text.startswith("---\nlibrary_name: streamdit\n")
    assert "[sample.mp4](sample.mp4): “a red circle”" in text
    assert "| colour | 0.75 |" in text
    assert "| default scheme | K=0 N=2 c=2 s=1 |" in text
    assert "| evaluations per chunk | 1 |" in text
    from evaluation.sheets import read_video

    assert read_video(card.with_name("sample.mp4")).shape == (12, 32, 32, 3)
    (example,) = store.rglob("input_example.json")
    assert "a red circle" in example.read_text()
    assert not [path for path in store.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


def test_versions_are_listed_as_a_table_and_as_json(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    store = tmp_path / "store"
    tracking = TrackingConfig(directory=str(store))
    register(folder / "teacher" / "model", "teacher", "best", tracking, {"colour": 0.5})
    register(folder / "student" / "model", "student", None, tracking)
    result = run("models", "--tracking-dir", store)
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert re.search(r"best +K=0 N=4 c=1 s=2 .*colour 0\.5", lines["teacher/1"])
    assert re.search(r"– +K=0 N=2 c=2 s=1 +teacher/1", lines["student/1"])
    rows = json.loads(run("models", "--json", "--tracking-dir", store).output)
    assert {row["name"] for row in rows} == {"teacher", "student"}
    teacher = next(row for row in rows if row["name"] == "teacher")
    assert teacher["aliases"] == ["best"]
    assert teacher["scores"] == {"colour": 0.5}
    only = json.loads(run("models", "student", "--json", "--tracking-dir", store).output)
    assert [row["name"] for row in only] == ["student"]
    result = run("models", "nobody", "--tracking-dir", store)
    assert result.exit_code == 2
    assert "no model 'nobody' is registered" in result.output


def test_listing_makes_no_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = run("models", "--tracking-dir", tmp_path / "none")
    assert result.exit_code == 2
    assert "there is no MLflow store" in result.output
    assert not (tmp_path / "none").exists()


def test_artifact_with_a_pickle_is_refused_by_name(folder, tracking):
    registered = register(folder / "student" / "model", "tiny", "best", tracking)
    (weights,) = (path for path in _artifacts(tracking) if path.name == "model.safetensors")
    for name in ("extra.pkl", "weights.pt", "pytorch_model.bin"):
        intruder = weights.parent / name
        intruder.write_bytes(b"\x80\x04.")
        with pytest.raises(UserError, match=rf"holds .*{re.escape(name)}, a pickle"):
            streamdit.load(registered.uri)
        intruder.unlink()
    assert streamdit.load(registered.uri)


def test_weights_other_than_the_registry_recorded_are_refused(folder, tracking):
    registered = register(folder / "student" / "model", "tiny", "best", tracking)
    (weights,) = (path for path in _artifacts(tracking) if path.name == "model.safetensors")
    config = read_model_config(weights.parent)
    others = {name: value + 1 for name, value in load_file(weights).items()}
    save_model_directory(weights.parent, config, others, weights.parent)
    with pytest.raises(UserError, match="but the registry recorded"):
        streamdit.load(registered.uri)


def _artifacts(tracking):
    from pathlib import Path

    return Path(tracking.directory).rglob("*")


def test_contradicting_options_are_one_line(folder):
    model = folder / "student" / "model"
    for options, message in (
        (("--lower-is-better",), "add --if-better METRIC"),
        (("--if-better", "colour"), "add --alias ALIAS"),
        (("--score", "colour"), "is not NAME=VALUE"),
        (("--score", "=3"), "a score of 3 has no name"),
        (("--score", "colour=nan"), "not a finite number"),
        (("--scores", "none.json"), "cannot be read"),
    ):
        result = run("register", model, "--sample-frames", 0, *options)
        assert result.exit_code == 2
        assert message in result.output


def test_configuration_other_than_the_registry_recorded_is_refused(folder, tracking):
    registered = register(folder / "student" / "model", "tiny", "best", tracking)
    (weights,) = (path for path in _artifacts(tracking) if path.name == "model.safetensors")
    path = weights.with_name("config.json")
    path.write_text(path.read_text().replace('"fps": 16.0', '"fps": 24.0'))
    assert read_model_config(path.parent).fps == 24
    with pytest.raises(UserError, match=r"holds config .* but the registry recorded"):
        streamdit.load(registered.uri)


def made_by(folder, name, run_id):
    """A model directory whose lineage names a run."""
    (folder / name).mkdir()
    return write_model_directory(folder / name, lineage={"run_id": run_id})


def test_run_that_made_the_model_stays_as_it_ended(tracking, tmp_path, monkeypatch):
    client, experiment = connect(tracking)
    ended = client.create_run(experiment, start_time=1000).info.run_id
    client.set_terminated(ended, "KILLED", end_time=5000)
    running = client.create_run(experiment).info.run_id
    for name, run_id, status, end in (
        ("ended", ended, "KILLED", 5000),
        ("running", running, "RUNNING", None),
    ):
        register(made_by(tmp_path, name, run_id), name, "best", tracking)
        info = client.get_run(run_id).info
        assert (info.status, info.end_time) == (status, end)
        assert client.get_model_version(name, "1").run_id == run_id
        assert streamdit.load(f"models:/{name}@best")

    def breaks(*_):
        raise UserError("in the middle of it")

    monkeypatch.setattr("training.registry.refuse_pickles", breaks)
    with pytest.raises(UserError, match="in the middle"):
        register(tmp_path / "ended" / "model", "again", None, tracking)
    assert client.get_run(ended).info.status == "KILLED"


def test_run_that_was_deleted_is_made_up_for(tracking, tmp_path):
    client, experiment = connect(tracking)
    gone = client.create_run(experiment).info.run_id
    client.delete_run(gone)
    register(made_by(tmp_path, "gone", gone), "tiny", "best", tracking)
    own = client.get_run(client.get_model_version("tiny", "1").run_id).info
    assert own.run_id != gone
    assert (own.run_name, own.status) == ("register-tiny", "FINISHED")


def test_command_moves_the_alias_only_on_improvement(folder, tmp_path):
    scores = tmp_path / "scores.json"
    model, store = folder / "teacher" / "model", tmp_path / "store"
    command = ("register", model, "--sample-frames", 0, "--alias", "best", "--scores", scores)
    for flicker, options, told in (
        (0.5, (), "points to version 1"),
        (0.7, (), "points to version 2 (flicker 0.7 is higher than 0.5 of version 1)"),
        (0.6, (), "does not move to version 3 (flicker 0.6 is not higher than 0.7 of version 2)"),
        (0.6, ("--lower-is-better",), "points to version 4 (flicker 0.6 is lower than 0.7"),
    ):
        scores.write_text(json.dumps({"flicker": flicker}))
        result = run(*command, "--if-better", "flicker", *options, "--tracking-dir", store)
        assert result.exit_code == 0, result.output
        assert told in " ".join(result.output.split())


def test_text_encoders_that_stay_behind_are_named(tmp_path):
    from streamdit.config import TextEncoderConfig

    near = TextEncoderConfig(name="a", kind="bytes", width=8, max_tokens=4)
    far = TextEncoderConfig(name="b", kind="t5", source="google/ul2", width=8, max_tokens=4)
    local = far.model_copy(update={"name": "c", "source": str(tmp_path)})
    config = SimpleNamespace(text_encoders=(near, far, local))
    with mock.patch("jobs.register.read_model_config", return_value=config):
        assert local_text_encoders(tmp_path) == {"c": str(tmp_path)}


def test_run_that_was_made_after_its_model_is_found_beside_it(tracking, tmp_path):
    client, experiment = connect(tracking)
    late = client.create_run(experiment).info.run_id
    model = write_model_directory(tmp_path, lineage={"fingerprint": "abc", "run_id": None})
    record = tmp_path / "mlflow-run.json"
    for fingerprint, same in (("other", False), ("abc", True)):
        record.write_text(json.dumps({"run_id": late, "fingerprint": fingerprint}))
        made = register(model, "tiny", None, tracking)
        assert (client.get_model_version("tiny", made.version).run_id == late) is same
        assert (made.tags.get("run_id") == late) is same
