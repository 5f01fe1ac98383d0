import numpy as np
import pytest
from conftest import COLOURS, scene_pictures, write_shots
from scenedetect import SceneManager, open_video
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from pipeline.config import ClipConfig, SceneConfig
from pipeline.decode import scan
from pipeline.scenes import Scene, SceneFinder
from pipeline.survey import clip_starts, survey


def find(config, pictures, times, end_s):
    finder = SceneFinder(config, fps=16.0)
    for time_s, picture in zip(times, pictures, strict=True):
        finder.add(time_s, picture)
    return finder.scenes(end_s)


def shots(*lengths):
    names = list(COLOURS)
    return [p for i, n in enumerate(lengths) for p in scene_pictures(COLOURS[names[i]], n)]


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_hard_cuts_are_found_at_the_frame(detector):
    config = SceneConfig(detector=detector, min_scene_s=0.5)
    times = [i / 16 for i in range(100)]
    scenes = find(config, shots(30, 25, 45), times, 100 / 16)
    assert scenes == [Scene(0.0, 30 / 16), Scene(30 / 16, 55 / 16), Scene(55 / 16, 100 / 16)]


def test_boundaries_are_presentation_times_of_a_variable_frame_rate():
    times = np.cumsum([0.0] + [(0.02, 0.1, 0.05)[i % 3] for i in range(59)]).tolist()
    scenes = find(SceneConfig(detector="content", min_scene_s=0.5), shots(30, 30), times, 99.0)
    assert scenes == [Scene(0.0, times[30]), Scene(times[30], 99.0)]


def test_trimming_drops_frames_beside_cuts_but_not_at_the_ends():
    config = SceneConfig(detector="content", min_scene_s=0.5, trim_frames=2)
    scenes = find(config, shots(20, 20), [i / 16 for i in range(40)], 40 / 16)
    assert scenes == [Scene(0.0, 18 / 16), Scene(22 / 16, 40 / 16)]


def test_a_cut_to_black_and_back_is_found_by_the_threshold_detector():
    black = [np.zeros((64, 64, 3), np.uint8)] * 10
    pictures = [*scene_pictures((180, 180, 180), 30), *black, *scene_pictures((90, 120, 90), 30)]
    config = SceneConfig(detector="threshold", min_scene_s=0.5)
    scenes = find(config, pictures, [i / 16 for i in range(70)], 70 / 16)
    assert len(scenes) == 2
    assert 30 / 16 <= scenes[1].start_s <= 40 / 16


@pytest.mark.parametrize(
    ("config", "detector"),
    [
        (SceneConfig(detector="content", min_scene_s=0.5), ContentDetector(min_scene_len=8)),
        (SceneConfig(detector="adaptive", min_scene_s=0.5), AdaptiveDetector(min_scene_len=8)),
    ],
)
def test_boundaries_equal_those_of_scenedetect_itself(tmp_path, config, detector):
    path = write_shots(tmp_path / "v.mp4", ["red", "green", "blue", "yellow"], seconds=1.5)
    manager = SceneManager()
    manager.auto_downscale = False
    manager.add_detector(detector)
    manager.detect_scenes(open_video(str(path), backend="pyav"))
    expected = [(start.seconds, end.seconds) for start, end in manager.get_scene_list()]
    finder = SceneFinder(config, fps=16.0)
    for time_s, picture in scan(str(path), height=64):
        finder.add(time_s, picture)
    found = [(scene.start_s, scene.end_s) for scene in finder.scenes(6.0)]
    assert len(found) == 4
    assert np.allclose(found, expected, atol=1e-6)


def test_clips_fill_a_scene_at_the_stride():
    clip = ClipConfig(frames=16, fps=16.0, height=32, width=32, stride_frames=8)
    assert list(clip_starts(Scene(1.0, 2.99), clip)) == [1.0, 1.5]
    assert list(clip_starts(Scene(1.0, 3.0), clip)) == [1.0, 1.5, 2.0]
    assert list(clip_starts(Scene(0.0, 0.9), clip)) == []


def test_survey_describes_the_video_and_its_clips(tmp_path, small_config):
    path = write_shots(tmp_path / "v.mp4", ["red", "blue"], seconds=2.0)
    source, clips = survey(str(path), "s1", small_config.clip, small_config.scenes)
    assert (source["frames"], source["scenes"], source["clips"]) == (64, 2, 4)
    assert source["duration_s"] == pytest.approx(4.0)
    assert [clip["start_s"] for clip in clips] == [0.0, 1.0, 2.0, 3.0]
    assert [clip["scene"] for clip in clips] == [0, 0, 1, 1]
    assert {clip["bucket"] for clip in clips} == {"16x32x32"}
    again = survey(str(path), "s1", small_config.clip, small_config.scenes)[1]
    other = survey(str(path), "s2", small_config.clip, small_config.scenes)[1]
    ids = [clip["clip_id"] for clip in clips]
    assert [clip["clip_id"] for clip in again] == ids
    assert len({*ids, *(clip["clip_id"] for clip in other)}) == 8
