"""`annotate` looks at a film piece by piece, and loses no more of it than it must."""

import weakref

import pytest
from broken_videos import decoder_that
from conftest import write_shots

from pipeline import annotate as module
from pipeline.annotate import RUN_CLIPS, annotate
from pipeline.curate import curate
from pipeline.schema import read_annotations, read_clips, read_dead_letters

FRAMES_PER_CLIP = 2


@pytest.fixture
def config(small_config):
    """Many clips that overlap."""
    clip = small_config.clip.model_copy(update={"stride_frames": 2})
    decode = small_config.decode.model_copy(update={"deadline_s": 10.0})
    limits = small_config.limits.model_copy(update={"dead_share": 1.0})
    return small_config.model_copy(update={"clip": clip, "decode": decode, "limits": limits})


@pytest.fixture
def dataset(tmp_path, config, without_ray):
    write_shots(tmp_path / "film.mp4", ["red"], seconds=11)
    curate([str(tmp_path / "film.mp4")], tmp_path / "data", config)
    clips = read_clips(tmp_path / "data").to_pylist()
    assert len(clips) == 81 > 2 * RUN_CLIPS
    return tmp_path / "data"


def test_pictures_of_a_film_are_held_for_one_run_of_clips_at_a_time(dataset, config, monkeypatch):
    held, calls, real = [], [], module.sample_frames

    def sample(uri, times, *rest):
        assert [picture for picture in held if picture() is not None] == []
        pictures = real(uri, times, *rest)
        held[:] = [weakref.ref(picture) for picture in pictures]
        calls.append(times)
        return pictures

    monkeypatch.setattr(module, "sample_frames", sample)
    summary = annotate(dataset, config)
    assert (summary.clips, summary.captions, summary.dead) == (81, 81, 0)
    assert [len(times) for times in calls] == [64, 64, 34]
    starts = [time_s for times in calls for time_s in times[::FRAMES_PER_CLIP]]
    assert starts == sorted(starts)
    assert all(row["colourfulness"] > 0 for row in read_annotations(dataset).to_pylist())


HANGING_LATE = """
import time
import pipeline.decode as module
real = module.read_sparse
def read_sparse(uri, times, height):
    open({tries!r}, 'a').write('x')
    if {fails}:
        {deed}
    return real(uri, times, height)
module.read_sparse = read_sparse
"""


def annotate_with(monkeypatch, tmp_path, dataset, config, fails, deed):
    """Annotate with a decoder that fails; returns its tries and the clips without scores."""
    tries = tmp_path / "tries"
    code = HANGING_LATE.format(tries=str(tries), fails=fails, deed=deed)
    with decoder_that(monkeypatch, tmp_path, code):
        annotate(dataset, config)
    starts = {row["clip_id"]: row["start_s"] for row in read_clips(dataset).to_pylist()}
    rows = read_annotations(dataset).to_pylist()
    lost = sorted(starts[row["clip_id"]] for row in rows if row["colourfulness"] is None)
    assert all(row["caption"] for row in rows)
    return len(tries.read_text()), lost


def test_a_hang_late_in_a_film_leaves_the_clips_before_it(tmp_path, dataset, config, monkeypatch):
    tries, lost = annotate_with(
        monkeypatch, tmp_path, dataset, config, "times[0] > 3", "time.sleep(600)"
    )
    assert tries == 2
    assert lost == [i / 8 for i in range(32, 81)]
    (letter,) = read_dead_letters(dataset).to_pylist()
    assert (letter["error_class"], letter["retryable"]) == ("DeadlineExceeded", False)
    assert (letter["start_s"], letter["end_s"]) == (4.0, 8.875)


def test_a_damaged_middle_of_a_film_costs_the_clips_there(tmp_path, dataset, config, monkeypatch):
    tries, lost = annotate_with(
        monkeypatch, tmp_path, dataset, config, "3 < times[0] < 7", "raise ValueError('damaged')"
    )
    assert tries == 3
    assert lost == [i / 8 for i in range(32, 64)]
    (letter,) = read_dead_letters(dataset).to_pylist()
    assert (letter["error_class"], letter["message"]) == ("ValueError", "damaged")
    assert (letter["start_s"], letter["end_s"]) == (4.0, 8.875)


def test_one_reason_that_fails_all_clips_of_a_film_is_one_dead_letter(
    tmp_path, dataset, config, monkeypatch
):
    tries, lost = annotate_with(
        monkeypatch, tmp_path, dataset, config, "True", "raise ValueError('damaged')"
    )
    assert (tries, len(lost)) == (3, 81)
    (letter,) = read_dead_letters(dataset).to_pylist()
    assert (letter["start_s"], letter["end_s"]) == (0.0, 11.0)
