"""Recipes: stages in order, stopped and continued anywhere, refused when their settings change."""

import itertools
import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml
from latent_dataset import train_settings, write_dataset
from processes import kill_tree, started
from safetensors.torch import load_file

from jobs.config import available_presets, load_config
from jobs.recipe import plan_stages, read_recipe, run_recipe
from pipeline.lock import writing
from streamdit.errors import UserError
from streamdit.io import read_model_config
from training.config import TrainConfig

ROOT = Path(__file__).parents[2]
STAGES = ["t2v", "task-learning", "quality", "distill"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "other", clips=16)


def write_recipe(folder, **changes):
    """The paper's stages at a size that trains in seconds, with one data set by name."""
    settings = train_settings(
        steps=2,
        validation={"samples": 0},
        tracking={"directory": str(folder / "mlflow")},
        **changes,
    )
    whole_buffer = "${model.buckets.0.frames}"
    stages = [
        {
            "name": "t2v",
            "settings": {
                "partition": {"entries": [{"chunk_frames": whole_buffer}]},
                "sampling": {"chunk_frames": whole_buffer, "micro_steps": 4},
            },
        },
        {"name": "task-learning", "dataset": "high-quality"},
        {"name": "quality", "settings": {"optimizer": {"learning_rate": 1e-5}}},
        {
            "name": "distill",
            "kind": "distill",
            "settings": {
                "steps": 2,
                "global_batch": 8,
                "precision": "float32",
                "teacher": {"chunk_frames": 1, "micro_steps": 2},
                "validation": {"samples": 0},
                "tracking": {"directory": str(folder / "mlflow")},
            },
        },
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"settings": settings, "stages": stages}))
    return path


def planned(folder, dataset, *overrides, **options):
    recipe = read_recipe(str(write_recipe(folder)))
    return plan_stages(recipe, dataset, folder / "run", overrides=overrides, **options)


def weights(out, stage):
    return load_file(out / stage / "model" / "model.safetensors")


@pytest.mark.parametrize("name", available_presets("recipe"))
def test_shipped_recipe_gives_every_stage_a_whole_configuration(name, dataset, tmp_path):
    stages = plan_stages(read_recipe(name), dataset, tmp_path)
    assert [stage.name for stage in stages][:1] == ["t2v"]
    first, *rest = [stage.config for stage in stages if isinstance(stage.config, TrainConfig)]
    assert [entry.chunk_frames for entry in first.partition.entries] == [first.model.buffer_frames]
    assert all(len(config.partition.entries) > 1 for config in rest)


def test_papers_recipe_has_the_papers_stages(dataset, tmp_path):
    other = write_dataset(tmp_path / "other")
    stages = plan_stages(read_recipe("paper"), dataset, tmp_path, datasets={"high-quality": other})
    rows = [(s.name, s.config.steps, s.config.optimizer.learning_rate, s.dataset) for s in stages]
    assert rows == [
        ("t2v", 10_000, 1e-4, dataset),
        ("task-learning", 10_000, 1e-4, other),
        ("generalisation", 10_000, 1e-5, dataset),
        ("quality", 10_000, 1e-5, other),
        ("distill", 10_000, 1e-5, other),
    ]
    small = plan_stages(read_recipe("paper"), dataset, tmp_path, preset="small")
    assert small[0].config.model == load_config(TrainConfig, stage="train", preset="small").model


def test_setting_reaches_every_stage_that_has_it_and_a_stages_own_wins(dataset, tmp_path):
    stages = planned(
        tmp_path, dataset, "quality.steps=7", "steps=5", "distill.teacher.micro_steps=1"
    )
    assert [stage.config.steps for stage in stages] == [5, 5, 7, 5]
    assert stages[3].config.teacher.micro_steps == 1


def test_a_stage_does_not_train_on_what_another_distilled(dataset, tmp_path):
    recipe = read_recipe(str(write_recipe(tmp_path)))
    again = recipe.stages[2].model_copy(update={"name": "again"})
    turned = recipe.model_copy(update={"stages": (*recipe.stages, again)})
    with pytest.raises(UserError, match="stage again goes on from what stage distill distilled"):
        plan_stages(turned, dataset, tmp_path / "run")


def test_a_recipe_is_run_by_one_command_at_a_time(dataset, tmp_path):
    stages = planned(tmp_path, dataset)
    (tmp_path / "run" / "quality").mkdir(parents=True)
    with (
        writing(str(tmp_path / "run"), "streamdit train --recipe paper"),
        pytest.raises(UserError, match=r"`streamdit train --recipe paper` .* is writing to"),
    ):
        run_recipe("paper", stages, tmp_path / "run", redo="quality")
    assert (tmp_path / "run" / "quality").is_dir(), "what the other trains is not moved away"


def test_what_only_the_last_stage_cannot_do_is_told_before_the_first_one_starts(dataset, tmp_path):
    with pytest.raises(UserError, match=r"stage distill: global_batch 8 is not .* by 3 workers"):
        planned(tmp_path, dataset, "distill.launch.workers=3")
    alone = "quality.partition.entries=[{chunk_frames: 2}, {chunk_frames: 4}]"
    with pytest.raises(UserError, match=r"chunk_frames 1 .* not in the training mix of stage qual"):
        planned(tmp_path, dataset, alone, "quality.sampling.chunk_frames=2")


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["optimizer.lr=1"], {}, r"optimizer.lr=1 .* is not a known key"),
        (
            ["quality.model.depth=3"],
            {},
            "stage quality has a model of another shape than stage t2v",
        ),
        ([], {"datasets": {"hq": "DATASET"}}, "no stage asks for a data set 'hq'.*high-quality"),
    ],
)
def test_mistake_in_any_stage_is_told_before_the_first_one_starts(
    overrides, options, message, dataset, tmp_path
):
    options = {key: {"hq": dataset} for key in options}
    with pytest.raises(UserError, match=message):
        planned(tmp_path, dataset, *overrides, **options)


def test_recipe_of_unknown_name_or_key_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no recipe 'papr': choose one of demo, paper, or"):
        read_recipe("papr")
    path = tmp_path / "mine.yaml"
    path.write_text("stages: [{name: one, step: 3}]")
    with pytest.raises(UserError, match=r"recipe .*mine.yaml: stages.0.step: Extra inputs"):
        read_recipe(str(path))
    path.write_text("stages: [{name: one}, {name: one}]")
    with pytest.raises(UserError, match="two stages are named one"):
        read_recipe(str(path))


def test_stage_named_like_a_setting_is_refused(dataset, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stages: [{name: model}]")
    with pytest.raises(UserError, match=r"stage model is named like a setting; .* model.KEY=VALUE"):
        plan_stages(read_recipe(str(path)), dataset, tmp_path)


def test_each_stage_starts_from_the_model_of_the_one_before_under_one_mlflow_run(
    dataset, other_dataset, tmp_path, one_worker
):
    from mlflow import MlflowClient

    stages = planned(tmp_path, dataset, datasets={"high-quality": other_dataset})
    out = tmp_path / "run"
    assert run_recipe("tiny", stages, out) == out / "distill" / "model"
    configs = [read_model_config(out / name / "model") for name in STAGES]
    for before, after in itertools.pairwise(configs):
        assert after.lineage["parent"] == before.weights_sha256
    assert [entry.chunk_frames for entry in configs[0].partition.entries] == [4]
    assert [entry.chunk_frames for entry in configs[1].partition.entries] == [1, 2, 4]

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("streamdit")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == sorted([*STAGES, "tiny"])
    above = runs["tiny"].info.run_id
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in STAGES} == {above}
    assert runs["task-learning"].data.tags["dataset"] == str(other_dataset)
    assert runs["t2v"].data.tags["dataset"] == str(dataset)

    # Again: nothing is trained, and nothing is logged anew.
    written = (out / "t2v/model/model.safetensors").stat().st_mtime_ns
    run_recipe("tiny", stages, out)
    assert (out / "t2v/model/model.safetensors").stat().st_mtime_ns == written
    assert len(client.search_runs([experiment.experiment_id])) == 5

    # A changed stage is refused by the setting's name, until it is redone, with all after it.
    changed = planned(
        tmp_path,
        dataset,
        "quality.optimizer.learning_rate=1e-3",
        datasets={"high-quality": other_dataset},
    )
    with pytest.raises(
        UserError,
        match=r"quality in .* trained with optimizer.learning_rate=1e-05, not 0.001; .*--redo qual",
    ):
        run_recipe("tiny", changed, out)
    before = weights(out, "quality")
    run_recipe("tiny", changed, out, redo="quality")
    assert (out / "t2v/model/model.safetensors").stat().st_mtime_ns == written
    assert (out / "quality.1/model/config.json").is_file()
    after = weights(out, "quality")
    assert any((before[name] != after[name]).any() for name in before)
    assert read_model_config(out / "distill/model").lineage["parent"] == (
        read_model_config(out / "quality/model").weights_sha256
    )


def command(recipe, dataset, out, port):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"),
        *("-m", "jobs.train", str(dataset), "--recipe", str(recipe), "--out", str(out)),
    ]


def start(*arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return started(*command(*arguments, port), env=environment)


@pytest.mark.slow
def test_recipe_killed_in_its_second_stage_ends_with_the_weights_of_an_unbroken_one(
    dataset, tmp_path
):
    (tmp_path / "mlflow").mkdir()
    recipe = write_recipe(tmp_path, checkpoint={"every": 1, "keep": 2})
    with start(recipe, dataset, tmp_path / "straight") as straight:
        said, _ = straight.communicate(timeout=400)
    assert straight.returncode == 0, said
    assert said.count("model: ") == 1, said
    assert said.count("stage 2/4: task-learning") == 1, said

    marker = tmp_path / "broken/task-learning/checkpoints/step-00000001/complete.json"
    deadline = time.monotonic() + 200
    with start(recipe, dataset, tmp_path / "broken") as broken:
        while not marker.exists():
            assert broken.poll() is None, broken.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kill_tree(broken)  # torchrun's workers have sessions of their own
    assert not (tmp_path / "broken/task-learning/model").exists(), "it was meant to be cut off"
    finished = (tmp_path / "broken/t2v/model/model.safetensors").stat().st_mtime_ns
    with start(recipe, dataset, tmp_path / "broken") as again:
        said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert (tmp_path / "broken/t2v/model/model.safetensors").stat().st_mtime_ns == finished
    for stage in STAGES:
        one, two = weights(tmp_path / "straight", stage), weights(tmp_path / "broken", stage)
        assert all((one[name] == two[name]).all() for name in one), stage
    for out in ("straight", "broken"):
        assert json.loads((tmp_path / out / "recipe.json").read_text())["run_id"]
