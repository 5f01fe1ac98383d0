from fractions import Fraction

import numpy as np
import pytest
from conftest import code_picture, read_code, write_video

from pipeline.clips import fit, read_clip, read_clip_with_lead
from pipeline.decode import DecodeError

B_FRAMES = {"bf": "3", "b-adapt": "0", "g": "20"}


def frames_on_screen(times, start_s, frames, fps):
    """Slow reference: for each time, the last frame that has appeared by then."""
    numbers = []
    for i in range(frames):
        asked = start_s + i / fps
        numbers.append(max(n for n, appears in enumerate(times) if appears <= asked + 1e-6))
    return numbers


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("source_fps", [10, 16, 25, 60])
def test_clips_hold_the_frames_on_screen(tmp_path, source_fps, container):
    count = source_fps * 6
    path = write_video(
        tmp_path / f"v.{container}",
        [code_picture(i) for i in range(count)],
        fps=source_fps,
        options=B_FRAMES,
    )
    times = [i / source_fps for i in range(count)]
    for start in (0, 1, 17, count // 2, count // 2 + 1):
        clip = read_clip(str(path), times[start], 24, 16.0, 24, 48)
        assert clip.shape == (24, 24, 48, 3)
        assert clip.dtype == np.uint8
        found = [read_code(frame) for frame in clip]
        assert found == frames_on_screen(times, times[start], 24, 16.0), (start, found)


def test_clips_of_a_variable_frame_rate_follow_presentation_times(tmp_path):
    ticks = np.cumsum([0] + [(15, 45, 210, 30)[i % 4] for i in range(79)]).tolist()
    path = write_video(
        tmp_path / "v.mp4",
        [code_picture(i) for i in range(80)],
        ticks=ticks,
        time_base=Fraction(1, 1000),
        options=B_FRAMES,
    )
    times = [tick / 1000 for tick in ticks]
    for start_s in (0.0, 0.3, 1.27, times[33], times[50] + 0.001):
        clip = read_clip(str(path), start_s, 16, 16.0, 48, 96)
        assert [read_code(f) for f in clip] == frames_on_screen(times, start_s, 16, 16.0)


def test_the_last_frame_stays_for_its_duration_and_no_longer(tmp_path):
    path = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(32)])
    whole = read_clip(str(path), 1.0, 16, 16.0, 48, 96)
    assert [read_code(frame) for frame in whole] == list(range(16, 32))
    with pytest.raises(DecodeError, match=r"ends at 2\.000 s, before the clip's frame at 2\.000 s"):
        read_clip(str(path), 1.0, 17, 16.0, 48, 96)


def test_a_clip_with_lead_has_the_frame_before_it_unless_the_scene_starts_there(tmp_path):
    path = write_video(tmp_path / "v.mp4", [code_picture(i) for i in range(32)])
    arguments = (str(path), 0.5, 8, 16.0, 48, 96)
    inside = read_clip_with_lead(*arguments, scene_start_s=0.0)
    assert [read_code(frame) for frame in inside] == [7, *range(8, 16)]
    at_start = read_clip_with_lead(*arguments, scene_start_s=0.5)
    assert [read_code(frame) for frame in at_start] == [8, *range(8, 16)]


def test_pictures_are_cropped_centrally_before_resizing():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200
    assert (fit(picture, 20, 20) == 200).all()
    assert (fit(picture, 80, 80) == 200).all()
    assert fit(picture, 20, 50).shape == (20, 50, 3)
    tall = np.zeros((100, 40, 3), np.uint8)
    tall[30:70] = 90
    assert (fit(tall, 16, 16) == 90).all()


def test_shrinking_averages_areas():
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[::2] = 100
    assert (fit(picture, 2, 2) == 50).all()
