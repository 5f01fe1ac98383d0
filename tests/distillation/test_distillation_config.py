"""Settings of a distillation that cannot work are refused before it starts."""

import pytest
from latent_dataset import write_dataset
from model_directory import write_model_directory
from pydantic import ValidationError

from distillation.config import DistillConfig, DriftConfig, TeacherConfig, share_at
from jobs.distill import distillation_job
from streamdit.config import PartitionConfig, PartitionEntry
from streamdit.errors import UserError


def settings(**changes):
    teacher = {"chunk_frames": 1, "micro_steps": 2} | changes.pop("teacher", {})
    return DistillConfig.model_validate(
        {"steps": 2, "global_batch": 4, "teacher": teacher} | changes
    )


def test_distillation_without_a_way_to_start_is_refused():
    with pytest.raises(ValidationError, match="could not make the first video"):
        TeacherConfig(chunk_frames=1, micro_steps=2, uniform_share=0)
    assert TeacherConfig(chunk_frames=1, micro_steps=2, uniform_share=0, ramp_share=0.1)
    with pytest.raises(ValidationError, match="with reference_frames the first video"):
        TeacherConfig(
            chunk_frames=1, micro_steps=2, reference_frames=1, uniform_share=0, ramp_share=0.1
        )
    with pytest.raises(ValidationError, match="set ramp_share: 0"):
        TeacherConfig(chunk_frames=1, micro_steps=2, reference_frames=1, ramp_share=0.1)
    with pytest.raises(ValidationError, match="together exceed 1"):
        TeacherConfig(chunk_frames=1, micro_steps=2, uniform_share=0.7, ramp_share=0.7)
    with pytest.raises(ValidationError, match="reference_frames is 0; set reference_frames"):
        TeacherConfig(chunk_frames=1, micro_steps=2, continued_share=0.1)


def test_share_is_linear_between_points_and_constant_outside():
    points = ((0.2, 0.0), (0.4, 1.0), (0.8, 0.5))
    found = [share_at(points, progress) for progress in (0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]
    assert found == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.5])


def test_impossible_drift_is_refused():
    with pytest.raises(ValidationError, match="must ascend"):
        DriftConfig(teacher=((0.5, 0.1), (0.2, 0.3)))
    with pytest.raises(ValidationError, match=r"give 1\.4 of the buffers at progress 1"):
        DriftConfig(teacher=((0.0, 0.7),), student=((0.0, 0.0), (1.0, 0.7)))
    with pytest.raises(ValidationError, match="drift cannot be had with"):
        settings(rollouts="somewhere", drift={"student": [[0.0, 0.5]]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    write_dataset(folder / "data")
    write_model_directory(folder)
    return folder


def test_student_says_what_it_was_distilled_for(folder):
    config = settings(teacher={"chunk_frames": 2, "guidance_scale": [2.0, 4.0], "ramp_share": 0.1})
    job = distillation_job(config, folder / "data", folder / "model", folder / "out")
    record = job.distilled
    assert [(s.chunk_frames, s.reference_frames) for s in record.schemes] == [(2, 0)]
    assert record.starts == ("text-to-video", "ramp")
    assert (record.teacher_micro_steps, record.teacher_guidance_scale) == (2, 3.0)
    assert (job.sampling.micro_steps, job.sampling.guidance_scale) == (1, 1.0)
    assert job.sampling.start == "text-to-video"

    assert record.teacher_guidance_by_segment == (2.0, 4.0)
    assert not record.continues


def test_student_says_whether_it_was_taught_to_continue_a_video(folder, tmp_path):
    entries = [PartitionEntry(chunk_frames=c, reference_frames=2) for c in (1, 2)]
    first = PartitionEntry(chunk_frames=4)
    config = settings(teacher={"reference_frames": 2, "continued_share": 0.2})
    knows = PartitionConfig(entries=(first, *entries))
    teacher = write_model_directory(tmp_path / "knows", partition=knows)
    job = distillation_job(config, folder / "data", teacher, folder / "out")
    assert job.distilled.continues
    lacks = PartitionConfig(entries=(first, entries[0]))
    teacher = write_model_directory(tmp_path / "lacks", partition=lacks)
    with pytest.raises(UserError, match=r"train it with \{chunk_frames: 2, reference_frames: 2\}"):
        distillation_job(config, folder / "data", teacher, folder / "out")
    plain = settings(teacher={"reference_frames": 2})
    assert not distillation_job(plain, folder / "data", teacher, folder / "out").distilled.continues
    # Runs that do not ask for it are the runs that they were before it could be asked for.
    assert "continued_share" not in plain.model_dump()["teacher"]


def test_number_of_weights_must_be_the_number_of_segments(folder):
    for changes, name in (
        ({"teacher": {"guidance_scale": [1.0, 2.0]}}, "teacher.guidance_scale has 2 numbers"),
        ({"segment_weights": [1.0]}, "segment_weights has 1 numbers"),
    ):
        with pytest.raises(UserError, match=f"{name} but chunk_frames 1 makes N = 4"):
            distillation_job(settings(**changes), folder / "data", folder / "model", folder / "out")


def test_teacher_must_know_what_is_asked_of_it(folder, tmp_path):
    config = settings(teacher={"chunk_frames": 3, "reference_frames": 1})
    with pytest.raises(UserError, match="was not in the training mix"):
        distillation_job(config, folder / "data", folder / "model", folder / "out")
    only = PartitionConfig(entries=(PartitionEntry(chunk_frames=1),))
    teacher = write_model_directory(tmp_path, partition=only)
    with pytest.raises(UserError, match="for ordinary text-to-video, which its training mix lacks"):
        distillation_job(settings(), folder / "data", teacher, folder / "out")
    by_ramp = settings(teacher={"uniform_share": 0, "ramp_share": 0.2})
    job = distillation_job(by_ramp, folder / "data", teacher, folder / "out")
    assert job.sampling.start == "ramp"


def test_a_student_is_no_teacher(folder, tmp_path):
    job = distillation_job(settings(), folder / "data", folder / "model", folder / "out")
    student = write_model_directory(tmp_path, distilled=job.distilled, sampling=job.sampling)
    with pytest.raises(UserError, match="is distilled already"):
        distillation_job(settings(), folder / "data", student, folder / "out")


def test_weights_of_segments_are_weights():
    for weights in ((0.0, 0.0), (1.0, -0.5), ()):
        with pytest.raises(ValidationError, match="weights of segments are not negative"):
            settings(segment_weights=weights)
    assert settings(segment_weights=(0.0, 2.0)).segment_weights == (0.0, 2.0)


def test_a_run_goes_on_with_its_teacher_placed_otherwise(folder, tmp_path):
    def fingerprint(**teacher):
        config = settings(teacher={"chunk_frames": 1, "micro_steps": 2, **teacher})
        out = tmp_path / "out"
        return distillation_job(config, folder / "data", folder / "model", out).fingerprint()

    assert fingerprint() == fingerprint(placement="sharded")
    assert fingerprint() != fingerprint(guidance_scale=1.5)
