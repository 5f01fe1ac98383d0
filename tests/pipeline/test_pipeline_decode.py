import os
import signal
import time
from fractions import Fraction

import numpy as np
import pytest
from conftest import code_picture, read_code, write_video

from pipeline import decode
from pipeline.child import Child, ChildError
from pipeline.clips import read_clip
from pipeline.decode import (
    probe,
    read_sparse,
    read_sparse_decord,
    read_sparse_pyav,
    sample_frames,
    scan,
)

B_FRAMES = {"bf": "3", "b-adapt": "0", "g": "20"}
UNEVEN_TICKS = np.cumsum([0] + [(7, 33, 120, 40, 16)[i % 5] for i in range(89)]).tolist()


def coded_video(path, kind):
    """A frame-number-coded video and the presentation time of every frame."""
    pictures = [code_picture(i) for i in range(90)]
    if kind == "variable":
        write_video(
            path, pictures, ticks=UNEVEN_TICKS, time_base=Fraction(1, 1000), options=B_FRAMES
        )
        return [tick / 1000 for tick in UNEVEN_TICKS]
    rate = Fraction(30000, 1001) if kind == "ntsc" else 25
    options = B_FRAMES if kind == "b-frames" else None
    write_video(path, pictures, fps=rate, options=options)
    return [float(i / rate) for i in range(90)]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("kind", ["constant", "b-frames", "variable", "ntsc"])
def test_scan_yields_every_frame_at_its_presentation_time(tmp_path, kind, container):
    path = tmp_path / f"video.{container}"
    times = coded_video(path, kind)
    found = list(scan(str(path), height=24))
    assert [read_code(picture) for _, picture in found] == list(range(90))
    assert [time_s for time_s, _ in found] == pytest.approx(times, abs=6e-4)
    assert found[0][1].shape == (24, 48, 3)


def test_scan_thins_to_the_rate_asked_for(tmp_path):
    path = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(60)], fps=30)
    numbers = [read_code(picture) for _, picture in scan(str(path), height=48, fps=10)]
    assert numbers == list(range(0, 60, 3))


def test_scan_does_not_enlarge(tmp_path):
    path = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(3)])
    assert next(iter(scan(str(path), height=1000)))[1].shape == (48, 96, 3)


@pytest.mark.parametrize("kind", ["constant", "b-frames", "variable", "ntsc"])
def test_sparse_frames_are_those_on_screen_by_both_decoders(tmp_path, kind):
    path = tmp_path / "video.mp4"
    times = coded_video(path, kind)
    wanted = [41, 3, 88, 0, 17, 17, 60, 61, 5, 70, 71, 72, 30, 31, 32, 33, 34, 89]
    following = [*times, times[-1] + 0.04]
    halfway = [(following[i] + following[i + 1]) / 2 for i in wanted]
    for read in (read_sparse_decord, read_sparse_pyav):
        assert [read_code(p) for p in read(str(path), halfway, None)] == wanted
        assert [read_code(p) for p in read(str(path), [times[i] for i in wanted], 24)] == wanted


def test_near_times_in_rising_order_take_one_seek(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    times = coded_video(path, "b-frames")
    seeks, real = [], decode.frames_from

    def counting(container, stream, time_s):
        seeks.append(time_s)
        return real(container, stream, time_s)

    monkeypatch.setattr(decode, "frames_from", counting)
    wanted = [3, 3, 20, 21, 60, 88, 40, 41, 0, 80]
    found = read_sparse_pyav(str(path), [times[i] for i in wanted], None)
    assert [read_code(picture) for picture in found] == wanted
    assert seeks == [times[i] for i in (3, 40, 0, 80)]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_long_video_is_not_read_whole_for_a_few_frames(tmp_path, monkeypatch, container):
    path = tmp_path / f"video.{container}"
    times = coded_video(path, "constant")
    used = []
    for read in (read_sparse_decord, read_sparse_pyav):

        def noting(*args, read=read):
            used.append(read)
            return read(*args)

        monkeypatch.setattr(decode, read.__name__, noting)
    for longest in (91, 89):
        monkeypatch.setattr(decode, "DECORD_FRAMES", longest)
        assert [read_code(p) for p in read_sparse(str(path), [times[7], times[70]], 24)] == [7, 70]
    assert used == [read_sparse_decord, read_sparse_pyav]


def test_sparse_frames_come_through_the_child_process(tmp_path):
    path = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(40)], fps=10)
    pictures = sample_frames(str(path), [0.05, 3.95, 2.0], height=24)
    assert [read_code(picture) for picture in pictures] == [0, 39, 20]
    assert pictures[0].shape == (24, 48, 3)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied_once_by_every_reader(tmp_path, rotation):
    picture = np.full((48, 96, 3), 30, np.uint8)
    picture[:24, :48] = (220, 40, 40)  # red in the upper left corner
    path = write_video(tmp_path / "v.mp4", [picture] * 8, rotation=rotation)
    upright = np.rot90(picture, rotation // 90)
    (_, scanned), *_ = scan(str(path), height=96)
    pictures = {
        "scan": scanned,
        "sample": read_sparse(str(path), [0.0], None)[0],
        "clip": read_clip(str(path), 0.0, 1, 16.0, *upright.shape[:2])[0],
        "pyav": read_sparse_pyav(str(path), [0.0], None)[0],
    }
    for reader, found in pictures.items():
        assert found.shape == upright.shape, reader
        assert np.abs(found.astype(int) - upright).mean() < 12, reader
    info = probe(str(path))
    assert (info.height, info.width) == upright.shape[:2]


def test_header_is_read_as_displayed(tmp_path):
    path = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(50)], fps=25)
    info = probe(str(path))
    assert (info.codec, info.width, info.height, info.fps) == ("h264", 96, 48, 25.0)
    assert info.frames == 50
    assert info.duration_s == pytest.approx(2.0)


def test_a_call_over_the_deadline_is_killed_and_the_next_one_works():
    child = Child()
    try:
        started = time.monotonic()
        with pytest.raises(ChildError, match=r"DeadlineExceeded: sleep took over 0\.3 s") as error:
            child.call(time.sleep, 60, deadline_s=0.3)
        assert not error.value.retryable
        assert time.monotonic() - started < 30
        assert child.call(divmod, 7, 2, deadline_s=30) == (3, 1)
    finally:
        child.close()


def test_a_crash_loses_only_the_call_that_crashed():
    child = Child()
    try:
        child.submit(abs, -1, deadline_s=30)
        child.submit(signal.raise_signal, signal.SIGSEGV, deadline_s=30)
        child.submit(abs, -3, deadline_s=30)
        assert child.result() == 1
        with pytest.raises(ChildError, match=r"DecoderCrashed: .*SIGSEGV") as error:
            child.result()
        assert not error.value.retryable
        assert child.result() == 3
    finally:
        child.close()


def test_a_call_whose_process_is_killed_from_outside_runs_again(tmp_path):
    mark = str(tmp_path / "mark")
    killed_once = (
        f"(os := __import__('os')).path.exists({mark!r}) "
        f"or (open({mark!r}, 'w').close(), os.kill(os.getpid(), 9))"
    )
    child = Child()
    try:
        child.submit(eval, killed_once, deadline_s=30)
        child.submit(abs, -3, deadline_s=30)
        assert child.result() is True
        assert child.result() == 3
    finally:
        child.close()


GETS_ON = (
    "[__import__('time').sleep({pause_s}) or __import__('pipeline.child').child.report_progress() "
    "for _ in range({steps})][-1]"
)


def test_a_call_that_gets_on_may_take_longer_than_its_deadline():
    child = Child()
    try:
        child.call(abs, -1, deadline_s=60)
        assert child.call(eval, GETS_ON.format(steps=12, pause_s=0.25), deadline_s=1.0) is None
        with pytest.raises(ChildError, match=r"DeadlineExceeded: eval took over 1 s"):
            child.call(eval, GETS_ON.format(steps=2, pause_s=5), deadline_s=1.0)
    finally:
        child.close()


def test_an_error_in_the_child_keeps_its_class_and_message():
    child = Child()
    try:
        with pytest.raises(ChildError) as error:
            child.call(os.listdir, "/no/such/folder", deadline_s=30)
        assert error.value.error_class == "FileNotFoundError"
        assert "/no/such/folder" in error.value.message
    finally:
        child.close()
