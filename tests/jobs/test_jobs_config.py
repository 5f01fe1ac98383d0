"""Presets, files and overrides: what wins, and that each mistake is one line that helps."""

import textwrap

import pytest
from pydantic import Field, field_validator, model_validator

import jobs.config
from jobs.config import available_presets, load_config
from jobs.schema_keys import dotted_keys, keys_at
from streamdit.config import DiTConfig, StrictModel
from streamdit.errors import UserError
from training.config import TrainConfig


class Bucket(StrictModel):
    frames: int = Field(gt=0)
    name: str = "any"


class Optimizer(StrictModel):
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value):
        if value <= 0:
            raise ValueError(f"learning rate {value} is not positive; use for example 1e-4")
        return value


class Settings(StrictModel):
    steps: int
    buckets: tuple[Bucket, ...] = ()
    optimizer: Optimizer = Optimizer()
    encoders: dict[str, int] = Field(default_factory=dict)
    resume: bool | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.steps == 13:
            raise ValueError("steps 13 is unlucky; use 12 or 14")
        return self


@pytest.fixture(autouse=True)
def presets(tmp_path, monkeypatch):
    """A package with two presets of one stage."""
    folder = tmp_path / "package"
    (folder / "cook").mkdir(parents=True)
    (folder / "cook" / "small.yaml").write_text(
        textwrap.dedent(
            """
            steps: 10
            buckets:
              - {frames: 8, name: low}
              - {frames: 16, name: high}
            optimizer: {learning_rate: 1e-3}
            encoders: {bytes: 256}
            """
        )
    )
    (folder / "cook" / "large.yaml").write_text("steps: 1000\n")
    monkeypatch.setattr(jobs.config, "preset_folder", lambda stage: folder / stage)


def load(*overrides, preset="small", file=None, schema=Settings):
    return load_config(schema, stage="cook", preset=preset, file=file, overrides=overrides)


def failure(*overrides, **options):
    with pytest.raises(UserError) as caught:
        load(*overrides, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


def test_preset_alone_gives_its_values_and_the_schema_the_rest():
    settings = load()
    assert settings.steps == 10
    assert settings.optimizer.learning_rate == 1e-3
    assert settings.optimizer.betas == (0.9, 0.99)


def test_file_wins_over_preset_and_override_over_both(tmp_path):
    file = write(tmp_path, "steps: 20\noptimizer: {betas: [0.5, 0.6]}\n")
    settings = load("optimizer.learning_rate=1e-5", "encoders.t5=4096", file=file)
    assert settings.steps == 20
    assert settings.optimizer == Optimizer(learning_rate=1e-5, betas=(0.5, 0.6))
    assert settings.encoders == {"bytes": 256, "t5": 4096}
    assert [bucket.frames for bucket in settings.buckets] == [8, 16]


def test_list_in_a_file_replaces_the_list_of_the_preset(tmp_path):
    file = write(tmp_path, "buckets: [{frames: 4}]")
    assert load(file=file).buckets == (Bucket(frames=4),)


def test_overrides_reach_into_lists_replace_them_and_apply_in_order():
    assert load("buckets.1.frames=32").buckets[1] == Bucket(frames=32, name="high")
    assert load("buckets=[{frames: 2}]").buckets == (Bucket(frames=2),)
    assert load("steps=1", "steps=2").steps == 2
    assert load("resume=null").resume is None
    assert load("resume=true").resume is True


def test_interpolation_refers_to_another_setting(tmp_path):
    assert load(file=write(tmp_path, "encoders: {again: '${steps}'}")).encoders["again"] == 10


def test_presets_are_listed_by_stage():
    assert available_presets("cook") == ["large", "small"]
    assert available_presets("sew") == []


def test_shipped_presets_of_training_are_valid(monkeypatch):
    monkeypatch.undo()
    names = available_presets("train")
    assert "demo" in names
    for name in names:
        assert load_config(TrainConfig, stage="train", preset=name).steps > 0


def test_missing_preset_lists_those_that_exist():
    assert failure(preset="huge") == (
        "preset 'huge' does not exist for cook: choose one of large, small, or pass your own with "
        "--config FILE"
    )


def test_missing_file_lists_its_neighbours(tmp_path):
    write(tmp_path, "steps: 1", "mine.yaml")
    message = failure(file=tmp_path / "mien.yaml")
    assert message == f"config file {tmp_path}/mien.yaml does not exist: {tmp_path}/ has mine.yaml"


def test_syntax_error_in_a_file_names_file_line_and_reason(tmp_path):
    file = write(tmp_path, "steps: 1\nbuckets: [1, 2\noptimizer: 3\n")
    message = failure(file=file)
    assert message.startswith(f"config file {file}, line 3: not valid YAML (")
    assert "mend the syntax" in message


def test_key_given_twice_in_a_file_is_refused(tmp_path):
    message = failure(file=write(tmp_path, "steps: 1\nsteps: 2\n"))
    assert "line 2" in message
    assert "found duplicate key steps" in message


@pytest.mark.parametrize(("text", "reason"), [("- 1\n- 2\n", "is a list")])
def test_file_that_is_no_mapping_is_refused(tmp_path, text, reason):
    message = failure(file=write(tmp_path, text))
    assert reason in message
    assert "key: value" in message


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\x00\x00\x00\x20ftypisom\xff\xfe")
    message = failure(file=path)
    assert message.startswith(f"config file {path}")


def test_unknown_key_is_answered_with_close_siblings():
    assert failure("optimizer.learning_rat=2") == (
        "optimizer.learning_rat=2 (from the command line) is not a known key: did you mean "
        "optimizer.learning_rate?"
    )


def test_unknown_key_is_found_where_it_really_is():
    assert "did you mean optimizer.betas?" in failure("betas=[0.1, 0.2]")
    assert "did you mean buckets.0.name?" in failure("name=low")


def test_unknown_key_unlike_any_other_lists_what_there_is():
    assert failure("buckets.0.zzz=1") == (
        "buckets.0.zzz=1 (from the command line) is not a known key: known keys of buckets.0 are "
        "frames, name"
    )


def test_unknown_key_comes_before_the_key_that_it_misspells(tmp_path):
    message = failure(preset="large", file=write(tmp_path, "buckets: [{frame: 3}]"))
    assert message.startswith(f"buckets.0.frame=3 (from {tmp_path}/mine.yaml) is not a known key")
    assert message.endswith("did you mean buckets.0.frames? (and 1 more problem)")


def test_wrong_type_names_key_value_origin_reason_and_remedy(tmp_path):
    assert failure("steps=many") == (
        "steps=many (from the command line) does not fit: it should be a valid integer, unable to "
        "parse string as an integer; set steps=VALUE accordingly"
    )
    file = write(tmp_path, "buckets: [{frames: 0}]")
    assert failure(file=file) == (
        f"buckets.0.frames=0 (from {file}) does not fit: it should be greater than 0; set "
        "buckets.0.frames=VALUE accordingly"
    )


def test_origin_is_the_layer_that_spoke_last(tmp_path):
    file = write(tmp_path, "steps: a")
    assert f"steps=a (from {file})" in failure("optimizer.learning_rate=1", file=file)
    assert "steps=b (from the command line)" in failure("steps=b", file=file)


def test_validators_speak_in_their_own_words():
    assert failure("optimizer.learning_rate=-1") == (
        "optimizer.learning_rate=-1 (from the command line): learning rate -1.0 is not positive; "
        "use for example 1e-4"
    )
    assert failure("steps=13") == "steps 13 is unlucky; use 12 or 14"


def test_missing_key_says_how_to_give_it(tmp_path):
    message = failure("buckets=[{name: x}]")
    assert message == (
        "buckets.0.frames is missing: pass buckets.0.frames=VALUE, or set it in a file given with "
        "--config"
    )


def test_further_problems_are_counted():
    assert failure("steps=a", "resume=b", "encoders.t5=c").endswith("(and 2 more problems)")


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", ".a=1", ""])
def test_malformed_override_is_answered_with_the_form(override):
    assert failure(override) == (
        f"override {override!r} is not of the form dotted.key=value: write for example steps=100 "
        "or optimizer.learning_rate=1e-4"
    )


def test_override_with_broken_yaml_is_refused():
    message = failure("buckets=[1, 2")
    assert message.startswith("override 'buckets=[1, 2': '[1, 2' is not a valid YAML value (")


def test_override_of_a_list_entry_that_does_not_exist_is_refused():
    message = failure("buckets.7.frames=1")
    assert message.startswith("override 'buckets.7.frames=1' does not fit (list index out of range")
    assert "index that exists" in message


def test_unresolved_interpolation_is_refused():
    message = failure("encoders.x=${nowhere}")
    assert message.startswith("encoders.x: Interpolation key 'nowhere' not found")


def test_impossible_scheme_of_a_real_preset_is_one_line(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError) as caught:
        load_config(
            TrainConfig, stage="train", preset="demo", overrides=["sampling.chunk_frames=3"]
        )
    message = str(caught.value)
    assert message.startswith("chunk_frames 3 does not divide B - K = 8 - 0 = 8")
    assert "[1, 2, 4, 8]" in message
    assert "\n" not in message


def test_dotted_keys_cover_nesting_lists_and_optional_parts():
    keys = dotted_keys(TrainConfig)
    for key in (
        "model.buckets.0.window",
        "partition.entries.0.chunk_frames",
        "optimizer.learning_rate",
        "checkpoint",
        "steps",
    ):
        assert key in keys
    assert keys_at(TrainConfig, ["model"]) == list(DiTConfig.model_fields)
    assert keys_at(TrainConfig, ["model", "buckets", "3"])[0] == "frames"
    assert keys_at(TrainConfig, ["steps"]) == []


class Composite(StrictModel):
    title: str
    cook: Settings


def test_sections_bring_the_presets_of_other_stages(tmp_path):
    whole = tmp_path / "package" / "whole"
    whole.mkdir()
    (whole / "small.yaml").write_text("title: all\ncook: {resume: true}\n")
    settings = load_config(
        Composite,
        stage="whole",
        preset="small",
        overrides=["cook.steps=11", "cook.buckets.0.name=new"],
        sections=["cook"],
    )
    assert settings.cook.steps == 11
    assert settings.cook.resume is True
    assert [bucket.name for bucket in settings.cook.buckets] == ["new", "high"]
    with pytest.raises(UserError, match=r"did you mean cook\.steps"):
        load_config(
            Composite, stage="whole", preset="small", overrides=["steps=1"], sections=["cook"]
        )
