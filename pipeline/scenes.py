"""Scene boundaries, from scenedetect's detectors fed with frames that are decoded anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import SceneConfig

if TYPE_CHECKING:
    from scenedetect.detector import SceneDetector


@dataclass(frozen=True)
class Scene:
    """A run of frames without a cut, in seconds of presentation time; `end_s` is exclusive."""

    start_s: float
    end_s: float


class SceneFinder:
    """Takes the frames of a video one by one and tells its scenes at the end.

    The detectors count frames; here the count is turned back into the presentation time of the
    frame, so boundaries are exact for variable frame rates too.
    """

    def __init__(self, config: SceneConfig, fps: float) -> None:
        """Args: `config`, and the average frame rate, by which seconds become frames."""
        self.config = config
        self.fps = fps
        self.detector = make_detector(config, round(config.min_scene_s * fps))
        self.times: list[float] = []
        self.cuts: set[int] = set()

    def add(self, time_s: float, picture: np.ndarray) -> None:
        """Look at the next frame: its presentation time and RGB `uint8 [h, w, 3]`."""
        import cv2
        from scenedetect import FrameTimecode

        position = FrameTimecode(len(self.times), self.fps)
        self.times.append(time_s)
        found = self.detector.process_frame(position, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        self.cuts.update(cut.frame_num for cut in found)

    def scenes(self, end_s: float) -> list[Scene]:
        """Scenes of the video that ends at `end_s`, each trimmed on the sides of its cuts."""
        from scenedetect import FrameTimecode

        if not self.times:
            return []
        last = FrameTimecode(len(self.times) - 1, self.fps)
        self.cuts.update(cut.frame_num for cut in self.detector.post_process(last))
        bounds = [0, *sorted(cut for cut in self.cuts if 0 < cut < len(self.times))]
        trim = self.config.trim_frames
        scenes = []
        for i, first in enumerate(bounds):
            start = first + (trim if i else 0)
            end = bounds[i + 1] - trim if i + 1 < len(bounds) else len(self.times)
            if start < end:
                stop_s = self.times[end] if end < len(self.times) else end_s
                scenes.append(Scene(self.times[start], stop_s))
        return scenes


def make_detector(config: SceneConfig, min_frames: int) -> SceneDetector:
    """Detector of scenedetect for `config`; scenes last at least `min_frames`."""
    from scenedetect import AdaptiveDetector, ContentDetector, ThresholdDetector

    if config.detector == "adaptive":
        return AdaptiveDetector(
            adaptive_threshold=config.threshold or 3.0,
            min_scene_len=min_frames,
            min_content_val=config.min_content,
        )
    if config.detector == "content":
        return ContentDetector(threshold=config.threshold or 27.0, min_scene_len=min_frames)
    return ThresholdDetector(threshold=config.threshold or 12.0, min_scene_len=min_frames)
