"""`streamdit bench sprites`: from given models to a report, and from nothing to one."""

import json
from dataclasses import replace

import numpy as np
import pytest
from model_directory import write_model_directory
from typer.testing import CliRunner

import streamdit
from evaluation.sprites import SpriteWorldConfig
from jobs.cli import app
from jobs.config import load_config
from jobs.sprite_bench import SpriteBenchConfig, _scores, _stage_settings, measure
from jobs.sprite_systems import plan_systems, whole_chunks
from streamdit.config import DistillationRecord, DistilledScheme, SamplingConfig
from streamdit.errors import UserError
from streamdit.io import read_model_config


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher and a student with the same random weights."""
    return write_pair(tmp_path_factory.mktemp("models"))


def write_pair(folder, micro_steps=3, **changes):
    for name in ("teacher", "student"):
        (folder / name).mkdir()
    teacher = write_model_directory(folder / "teacher")
    record = DistillationRecord(
        schemes=(DistilledScheme(chunk_frames=1),),
        starts=("text-to-video",),
        teacher_sha256=read_model_config(teacher).weights_sha256,
        teacher_micro_steps=micro_steps,
        teacher_guidance_scale=2.0,
        **changes,
    )
    sampling = SamplingConfig(chunk_frames=1, micro_steps=1)
    return teacher, write_model_directory(folder / "student", distilled=record, sampling=sampling)


def test_systems_share_the_buffer_and_differ_in_steps_and_guidance(models):
    systems = plan_systems(*models)
    assert [system.label for system in systems] == [
        "teacher, 12 steps, guidance 2",
        "teacher, 4 steps, no guidance",
        "student, 4 steps",
    ]
    assert {system.sampling.chunk_frames for system in systems} == {1}
    with pytest.raises(UserError, match="was not distilled from"):
        plan_systems(models[1], models[0])


def test_time_is_taken_of_whole_chunks(models):
    model, system = streamdit.load(models[1]), plan_systems(*models)[2]
    assert model.config.autoencoder.temporal_factor == 4
    for chunk_frames, frames in ((1, 64), (3, 72), (5, 80), (32, 128)):
        sampling = system.sampling.model_copy(update={"chunk_frames": chunk_frames})
        assert whole_chunks(model, replace(system, sampling=sampling), 64) == frames


def test_teacher_with_weights_by_segment_is_named_as_what_stands_for_it(tmp_path):
    weights = (1.0, 2.0, 2.0, 3.0)
    systems = plan_systems(*write_pair(tmp_path, teacher_guidance_by_segment=weights))
    assert systems[0].label == "teacher, 12 steps, guidance 2 (mean of its weights by segment)"


def test_report_counts_evaluations_and_compares_on_the_same_noise(models, tmp_path):
    settings = ("prompts=2", "frames=8", "drift_prompts=1", "drift_buffers=[1]", "seeds=2")
    options = ("--teacher", models[0], "--student", models[1], "--out", tmp_path)
    result = run("bench", "sprites", *settings, *options)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "report.json").read_text())
    full, few, student = record["systems"]
    # 16 FPS and 4 frames a chunk of one latent: 4 chunks a second; 3 guided steps count 6.
    assert full["evaluations_per_second"] == 24.0
    assert few["evaluations_per_second"] == student["evaluations_per_second"] == 4.0
    # The student has its teacher's weights, so from the same noise it makes the same videos.
    assert few["accuracy"] == student["accuracy"]
    assert few["drift"] == student["drift"]
    assert full["agreement"] == [1.0, 1.0]
    text = (tmp_path / "report.md").read_text()
    assert "2 seeds of noise on one training; the intervals are of noise only" in text
    assert "those of wall times over 2 rounds of timing" in text
    assert [one["axis"] for one in record["verdicts"]] == list(full["right"])
    assert (tmp_path / "report.svg").stat().st_size > 1000
    videos = sorted((tmp_path / "videos").iterdir())
    made = [video.stat().st_mtime_ns for video in videos]
    run("bench", "sprites", *settings, *options)
    assert made == [video.stat().st_mtime_ns for video in videos]


def test_given_models_are_asked_for_what_their_world_held_out(models, tmp_path):
    settings = ("prompts=8", "frames=8", "drift_prompts=1", "drift_buffers=[1]", "seeds=1")
    options = ("--teacher", models[0], "--student", models[1], "--out", tmp_path)
    result = run("bench", "sprites", *settings, "world.held_out=3", *options)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report.md").read_text()
    assert text.count("interval") == 0
    assert "\n3 prompts whose combination" in text
    result = run("bench", "sprites", *settings, "train.steps=3", *options)
    assert result.exit_code == 2
    assert "train.steps=3 sets how models are made, but the models are given" in result.output


def test_trainings_are_given_one_for_each_seed(models, tmp_path):
    pair = ("--teacher", models[0], "--student", models[1])
    result = run("bench", "sprites", "seeds=3", *pair, *pair, "--out", tmp_path)
    assert result.exit_code == 2
    assert "2 trainings are given for 3 seeds; set seeds=2" in result.output
    settings = ("prompts=2", "frames=8", "drift_prompts=1", "drift_buffers=[1]", "seeds=2")
    result = run("bench", "sprites", *settings, *pair, *pair, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report.md").read_text()
    assert "2 seeds of noise on as many trainings; the intervals are over the seeds" in text


def test_models_come_in_pairs(models):
    result = run("bench", "sprites", "--teacher", models[0])
    assert result.exit_code == 2
    assert "belong together" in result.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_models_are_made_where_none_are_given(tmp_path):
    settings = (
        *("prompts=2", "frames=8", "drift_prompts=1", "drift_buffers=[1]", "seeds=1"),
        *("world.videos=6", "world.shots_per_video=4", "autoencoder.steps=20"),
        *("train.steps=4", "train.global_batch=4", "train.model.depth=2", "train.launch.workers=1"),
        *("distill.steps=2", "distill.global_batch=2", "distill.launch.workers=1"),
        "distill.teacher.micro_steps=2",
    )
    result = run("bench", "sprites", *settings, "--out", tmp_path / "bench")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "bench" / "report.json").read_text())
    assert record["systems"][0]["label"] == "teacher, 16 steps, guidance 2.5"
    assert len(record["stage_seconds"]) == 6
    text = (tmp_path / "bench" / "report.md").read_text()
    assert "Making the models, from the world to the last student, took " in text


def test_seeds_whose_models_are_sampled_otherwise_are_refused_before_anything_is_made(
    models, tmp_path
):
    other = write_pair(tmp_path, micro_steps=2)
    pairs = ("--teacher", models[0], "--student", models[1])
    pairs += ("--teacher", other[0], "--student", other[1])
    result = run("bench", "sprites", "seeds=2", *pairs, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "seed 1 must be distilled as the first, or measured apart" in result.output
    assert not (tmp_path / "out" / "videos").exists()
    (tmp_path / "slower").mkdir()
    slower = write_pair(tmp_path / "slower")
    for model in slower:
        config = read_model_config(model).model_copy(update={"fps": 8.0})
        (model / "config.json").write_text(config.model_dump_json())
    pairs = (*pairs[:4], "--teacher", slower[0], "--student", slower[1])
    result = run("bench", "sprites", "seeds=2", *pairs, "--out", tmp_path / "out")
    assert "makes buffers of 16 frames at 8 frames per second but" in " ".join(
        result.output.split()
    )
    result = run("bench", "sprites", "drift_buffers=[]", *pairs, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "drift_buffers" in result.output


def test_every_system_is_compared_with_the_full_teacher_and_read_again_later(
    models, tmp_path, monkeypatch
):
    """Videos are made up: which system, seed and frame they are is written into their pixels."""
    bench = SpriteBenchConfig(prompts=2, frames=8, drift_prompts=1, drift_buffers=(1, 3), seeds=2)
    systems = plan_systems(*models)
    buffer = 4 * 4  # four latent frames of four

    def made_up(system, seed, prompts, frames, out):
        number = [one.label for one in systems].index(system.label)
        values = 100 * number + 10 * seed + np.arange(frames) // buffer
        return np.broadcast_to(values[None, :, None], (len(prompts), frames, 1))

    compared, read = [], []

    def agreement(made, other, fps):
        compared.append((int(made[0, 0, 0]), int(other[0, 0, 0])))
        return [1.0] * len(made)

    def marks(videos, prompts, fps):
        read.append((int(videos[0, 0, 0]), videos.shape[1]))
        return {"colour": [int(videos[0, 0, 0]) >= 200] * len(videos)}

    monkeypatch.setattr("jobs.sprite_bench._videos", made_up)
    monkeypatch.setattr("jobs.sprite_bench.agreement_marks", agreement)
    monkeypatch.setattr("jobs.sprite_bench.marks_by_axis", marks)
    monkeypatch.setattr("jobs.sprite_bench.background_flicker", lambda made: 0.125)
    costs = {system.label: (8.0 + place, [0.5]) for place, system in enumerate(systems)}
    monkeypatch.setattr("jobs.sprite_bench.stream_costs", lambda *_: costs)
    figures = measure([systems, systems], bench, SpriteWorldConfig(), tmp_path)
    # Of each system both seeds, each beside the full teacher's of the same seed.
    assert compared == [(0, 0), (10, 10), (100, 0), (110, 10), (200, 0), (210, 10)]
    later = [value for value, frames in read if frames == 8 and value % 10 in (1, 3)]
    assert later == [1, 11, 3, 13, 101, 111, 103, 113, 201, 211, 203, 213]
    assert [one.wall_per_second for one in figures] == [[0.5]] * 3
    assert [one.evaluations_per_second for one in figures] == [8.0, 9.0, 10.0]
    assert _scores(figures[-1]) == {"colour": 1.0, "same_as_teacher": 1.0, "flicker": 0.125}


def test_settings_for_a_gpu_are_settings():
    bench = load_config(SpriteBenchConfig, stage="bench", preset="large")
    assert bench.drift_prompts == 32
    stages = _stage_settings(bench, (), ())
    assert stages.train.model.width == 384
    assert stages.distill.launch.use_gpu
