"""Scene boundaries, from scenedetect's detectors fed with frames that are decoded anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import SceneConfig

if TYPE_CHECKING:
    from pipeline.detectors import Cut


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
        from pipeline.detectors import make_detector

        self.config = config
        self.detector = make_detector(config, fps)
        self.times: list[float] = []
        self.cuts: set[Cut] = set()

    def add(self, time_s: float, picture: np.ndarray) -> None:
        """Look at the next frame: its presentation time and RGB `uint8 [h, w, 3]`."""
        self.times.append(time_s)
        self.cuts.update(self.detector.add(picture))

    def scenes(self, end_s: float) -> list[Scene]:
        """Scenes of the video that ends at `end_s`, each trimmed on the sides of its cuts."""
        if not self.times:
            return []
        self.cuts.update(self.detector.finish())
        count, trim = len(self.times), self.config.trim_frames
        cuts = sorted(cut for cut in self.cuts if cut.end > 0 and cut.start < count)
        starts = [0, *(cut.start + trim for cut in cuts)]
        ends = [*(cut.end - trim for cut in cuts), count]
        shown = [*self.times, end_s]
        return [
            Scene(shown[start], shown[end])
            for start, end in zip(starts, ends, strict=True)
            if start < end
        ]
