"""Training from a model directory: its shape goes before that of the preset."""

from __future__ import annotations

import pytest
from latent_dataset import write_dataset
from model_directory import write_model_directory

from jobs.config import load_config
from jobs.recipe import plan_stages, read_recipe
from jobs.train import parent_layers
from streamdit.config import DistillationRecord, DistilledScheme
from streamdit.errors import UserError
from streamdit.io import read_model_config
from training.config import TrainConfig

# The presets' partitions are for longer buffers than that of the small model here.
PARTITION = ("partition.entries=[{chunk_frames: 1}, {chunk_frames: 4}]", "sampling.chunk_frames=1")


@pytest.fixture
def parent(tmp_path):
    return write_model_directory(tmp_path / "parent")


def test_shape_is_the_parents_and_all_else_the_presets(parent):
    config = load_config(
        TrainConfig,
        stage="train",
        preset="streamdit-4b",
        overrides=PARTITION,
        more=parent_layers(parent),
    )
    # Text encoders too: the preset's are not mixed into the parent's.
    assert config.model == read_model_config(parent).model
    assert config.zero_stage == 2


def test_a_setting_of_the_model_still_wins(parent):
    changes = (*PARTITION, "model.qk_norm=none")
    config = load_config(
        TrainConfig, stage="train", preset="demo", overrides=changes, more=parent_layers(parent)
    )
    assert config.model.qk_norm == "none"
    assert config.model != read_model_config(parent).model


def test_every_stage_of_a_recipe_has_the_parents_shape(parent, tmp_path):
    dataset = write_dataset(tmp_path / "dataset")
    stages = plan_stages(
        read_recipe("paper"),
        dataset,
        tmp_path / "out",
        overrides=[*PARTITION, "distill.teacher.chunk_frames=1"],
        parent=parent_layers(parent),
    )
    shapes = [stage.config.model for stage in stages if isinstance(stage.config, TrainConfig)]
    assert len(shapes) == 4
    assert {shape.model_dump_json() for shape in shapes} == {
        read_model_config(parent).model.model_dump_json()
    }


def test_a_distilled_model_is_not_trained_on(parent):
    """Training would undo what distillation taught it, and its record would still claim it."""
    config = read_model_config(parent)
    record = DistillationRecord(
        schemes=(DistilledScheme(chunk_frames=1, reference_frames=0),),
        starts=("ramp",),
        continues=False,
        teacher_sha256="0" * 64,
        teacher_micro_steps=4,
        teacher_guidance_scale=2.0,
    )
    text = config.model_copy(update={"distilled": record}).model_dump_json()
    (parent / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"is distilled: .* train the model that it was distilled"):
        parent_layers(parent)
