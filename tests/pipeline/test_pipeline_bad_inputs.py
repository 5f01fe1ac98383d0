"""Every kind of bad input ends as one named row of the dead letters, and takes nothing along."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from broken_videos import (
    cut_index,
    cut_inside_a_picture,
    cut_pictures,
    decoder_that,
    lose_index,
    noise,
    overstate_frames,
    take_all_duration,
    write_sound,
)
from conftest import COLOURS, scene_pictures, write_shots, write_video

from pipeline import curate as curate_module
from pipeline.annotate import annotate
from pipeline.curate import curate
from pipeline.duplicate_table import read_duplicates
from pipeline.encode import encode
from pipeline.schema import read_annotations, read_clips, read_dead_letters
from pipeline.sources import content_id, list_sources
from pipeline.store import open_store
from streamdit.errors import UserError

STATIC_S = 3 * 3600


def write_overstated(path):
    avi = path.with_suffix(".avi")
    write_video(avi, scene_pictures(COLOURS["blue"], 40), codec="mpeg4")
    overstate_frames(avi, 50).rename(path)  # the content tells what it is, whatever the name


BAD = {
    "empty file": (Path.touch, "EmptyFileError", "the file is empty"),
    "text under the name of a video": (
        lambda path: path.write_text("this is no video " * 100),
        "InvalidDataError",
        "Invalid data",
    ),
    "index cut off": (cut_index, "DecodeError", "there is no video stream"),
    "index lost": (lose_index, "InvalidDataError", "Invalid data"),
    "pictures cut off": (cut_pictures, "TruncatedVideoError", "promises 64 frames"),
    "cut inside a picture": (cut_inside_a_picture, "InvalidDataError", "Invalid data"),
    "header promises too many frames": (
        write_overstated,
        "TruncatedVideoError",
        "promises 2000 frames",
    ),
    "no duration": (take_all_duration, "NoFrameTimesError", "the same presentation time"),
    "sound alone": (write_sound, "DecodeError", "there is no video stream"),
}


@pytest.fixture
def folder(tmp_path):
    """A folder with one good video of two clips, to which a bad one is added."""
    folder = tmp_path / "videos"
    write_shots(folder / "good.mp4", ["red"])
    return folder


def the_letter(dataset):
    """The only dead letter, after checking that the good video is whole."""
    clips = [row for row in read_clips(dataset).to_pylist() if row["uri"].endswith("good.mp4")]
    assert [clip["start_s"] for clip in clips] in ([0.0, 1.0], [1.0, 0.0])
    letters = read_dead_letters(dataset).to_pylist()
    assert len(letters) == 1, letters
    return letters[0]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_dead_letter_that_says_why(
    tmp_path, folder, small_config, without_ray, kind
):
    make, error_class, message = BAD[kind]
    make(folder / "bad.mp4")
    summary = curate([str(folder)], tmp_path / "data", small_config)
    assert (summary.sources, summary.dead) == (1, 1)
    letter = the_letter(tmp_path / "data")
    assert letter["uri"] == str(folder / "bad.mp4")
    assert letter["error_class"] == error_class
    assert message in letter["message"]
    assert not letter["retryable"]


def test_the_good_part_of_a_cut_video_is_kept_on_demand(
    tmp_path, folder, small_config, without_ray
):
    cut_pictures(folder / "bad.mp4")
    decode = small_config.decode.model_copy(update={"salvage": True})
    config = small_config.model_copy(update={"decode": decode})
    summary = curate([str(folder)], tmp_path / "data", config)
    assert (summary.sources, summary.dead) == (2, 0)
    assert 4.0 < summary.video_s < 2.0 + 40 / 16


def test_a_video_of_one_frame_is_one_dead_letter(tmp_path, folder, small_config, without_ray):
    write_video(folder / "still.mp4", scene_pictures(COLOURS["blue"], 1))
    summary = curate([str(folder)], tmp_path / "data", small_config)
    assert (summary.sources, summary.clips, summary.dead) == (1, 2, 1)
    letter = the_letter(tmp_path / "data")
    assert (letter["error_class"], letter["retryable"]) == ("StillVideoError", False)
    assert "it holds one frame" in letter["message"]


def write_still(path, seconds):
    """A picture that stays for so many seconds, one frame for each."""
    write_video(path, scene_pictures(COLOURS["blue"], 1) * seconds, fps=1)


def test_hours_of_a_still_picture_are_one_dead_letter_in_all_three_jobs(
    tmp_path, folder, small_config, autoencoder_dir, without_ray
):
    write_still(folder / "still.mp4", STATIC_S)
    dataset = tmp_path / "data"
    summary = curate([str(folder)], dataset, small_config)
    assert (summary.sources, summary.clips, summary.dead) == (1, 2, 1)
    assert (annotate(dataset, small_config).clips, read_annotations(dataset).num_rows) == (2, 2)
    assert encode(dataset, autoencoder_dir, small_config).clips == 2
    letter = the_letter(dataset)
    assert (letter["error_class"], letter["retryable"]) == ("StillVideoError", False)
    assert letter["message"].startswith(
        "nothing moves in its 10800.00 s: its 10800 frames show one picture"
    )


def test_still_videos_are_taken_on_demand_and_count_as_one_clip(
    tmp_path, folder, small_config, without_ray
):
    write_still(folder / "still.mp4", 100)
    decode = small_config.decode.model_copy(update={"still": True})
    config = small_config.model_copy(update={"decode": decode})
    assert curate([str(folder)], tmp_path / "data", config).dead == 0
    clips = read_clips(tmp_path / "data").to_pylist()
    still = {row["clip_id"]: row for row in clips if row["uri"].endswith("still.mp4")}
    assert len(still) == 100
    assert {row["static_share"] for row in still.values()} == {1.0}
    duplicates = read_duplicates(open_store(tmp_path / "data")).to_pylist()
    marked = [row for row in duplicates if row["clip_id"] in still and row["duplicate"]]
    assert len(marked) == 99


@pytest.mark.parametrize("moving", [range(96, 100), range(4)], ids=["end", "beginning"])
def test_a_video_that_moves_anywhere_loses_nothing(
    tmp_path, folder, small_config, without_ray, moving
):
    pictures = scene_pictures(COLOURS["blue"], 1) * 100
    for i in moving:
        pictures[i] = pictures[i].copy()
        pictures[i][50:53, 2 + i % 4 : 5 + i % 4] = 200  # a dot, in a few frames
    write_video(folder / "calm.mp4", pictures)
    summary = curate([str(folder)], tmp_path / "data", small_config)
    assert (summary.sources, summary.clips, summary.dead) == (2, 2 + 6, 0)


MISBEHAVING = """
import os, signal
import pipeline.survey as module
real = module.survey
def survey(uri, *rest):
    if uri.endswith('bad.mp4'):
        {deed}
    return real(uri, *rest)
module.survey = survey
"""


@pytest.mark.parametrize(
    ("deed", "error_class", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "DecoderCrashed", "signal SIGSEGV"),
        ("pow(7, 10**9)", "DeadlineExceeded", "took over 8 s"),
    ],
    ids=["crashes", "hangs"],
)
def test_a_video_that_takes_its_decoder_along_is_alone_in_that(
    tmp_path, folder, small_config, without_ray, monkeypatch, deed, error_class, message
):
    good, bad = folder / "good.mp4", folder / "bad.mp4"
    shutil.copy(good, bad)
    while source_id(bad) <= source_id(good):  # the good one comes first, in a decoder that is warm
        with bad.open("ab") as file:
            file.write(b"x")
    decode = small_config.decode.model_copy(update={"deadline_s": 8.0})
    config = small_config.model_copy(update={"decode": decode})
    with decoder_that(monkeypatch, tmp_path, MISBEHAVING.format(deed=deed)):
        curate([str(folder)], tmp_path / "data", config)
    letter = the_letter(tmp_path / "data")
    assert letter["uri"] == str(bad)
    assert letter["error_class"] == error_class
    assert message in letter["message"]
    assert not letter["retryable"], "each further try costs a process or a deadline"


def source_id(path):
    return content_id(str(path), path.stat().st_size)


@contextlib.contextmanager
def without_privileges():
    """What follows runs as a user who may read only what all may read."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_without_permission_gets_another_chance(
    tmp_path, small_config, without_ray, monkeypatch
):
    with tempfile.TemporaryDirectory() as public:  # pytest's own folders are private
        folder = Path(public)
        folder.chmod(0o755)
        write_shots(folder / "good.mp4", ["red"])
        write_shots(folder / "bad.mp4", ["blue"])
        (folder / "bad.mp4").chmod(0)

        def listing(inputs):
            with without_privileges():
                return list_sources(inputs)

        with monkeypatch.context() as patch:
            patch.setattr(curate_module, "list_sources", listing)
            curate([public], tmp_path / "data", small_config)
        letter = the_letter(tmp_path / "data")
        assert (letter["error_class"], letter["retryable"]) == ("PermissionError", True)
        (folder / "bad.mp4").chmod(0o644)
        assert curate([public], tmp_path / "data", small_config).sources == 2
        assert len(read_dead_letters(tmp_path / "data")) == 0


VANISHING = """
import boto3
import pipeline.storage as module
real = module.read_span
count = 0
def read_span(uri, start, length):
    global count
    count += uri.endswith('bad.mp4')
    if count == 3:
        boto3.client('s3').delete_object(Bucket='videos', Key='bad.mp4')
    return real(uri, start, length)
module.read_span = read_span
"""


def test_an_object_that_vanishes_while_it_is_decoded_is_named(
    tmp_path, folder, small_config, without_ray, monkeypatch, s3
):
    write_video(tmp_path / "bad.mp4", noise(64, 256))
    s3.upload_file(str(folder / "good.mp4"), "videos", "good.mp4")
    s3.upload_file(str(tmp_path / "bad.mp4"), "videos", "bad.mp4")
    assert (tmp_path / "bad.mp4").stat().st_size > 3 << 20
    with decoder_that(monkeypatch, tmp_path, VANISHING):
        curate(["s3://videos/"], tmp_path / "data", small_config)
    letter = the_letter(tmp_path / "data")
    assert letter["uri"] == "s3://videos/bad.mp4"
    assert letter["error_class"] == "MissingObjectError"
    assert "s3://videos/bad.mp4" in letter["message"]


def test_inputs_of_which_none_is_a_video_are_named_with_their_reasons(tmp_path, small_config):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 1 videos could be decoded: EmptyFileError"):
        curate([str(tmp_path)], tmp_path / "data", small_config)
