"""Scores of clips. They are only written; which clips to keep is the selection's business."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLACK_LUMA = 20.0
STATIC_CHANGE = 0.25
HASH_SIDE = 32

SCAN_SCORES = {
    "motion": "mean change of luma between consecutive source frames, in grey levels (0-255)",
    "blur": "mean variance of the Laplacian of luma; low is blurred",
    "brightness": "mean luma, 0-1",
    "black_share": f"share of frames with mean luma below {BLACK_LUMA:g} of 255",
    "static_share": f"share of frame pairs that change by less than {STATIC_CHANGE:g} grey levels",
}
"""Name and meaning of every number that the low-resolution pass gives."""


class FrameScores:
    """Measures frames one by one, and sums up any span of them afterwards."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.luma: list[float] = []
        self.laplacian: list[float] = []
        self.change: list[float] = []
        self.hashes: list[int] = []
        self._previous: np.ndarray | None = None

    def add(self, time_s: float, picture: np.ndarray) -> None:
        """Measure the next frame: its presentation time and RGB `uint8 [h, w, 3]`."""
        import cv2

        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        self.times.append(time_s)
        self.luma.append(float(grey.mean()))
        self.laplacian.append(float(cv2.Laplacian(grey, cv2.CV_32F).var()))
        previous = grey if self._previous is None else self._previous
        self.change.append(float(cv2.absdiff(grey, previous).mean()))
        self.hashes.append(perceptual_hash(grey))
        self._previous = grey

    def summarise(self, start_s: float, end_s: float) -> dict[str, float | str]:
        """Scores of the frames shown first in `[start_s, end_s)`, see :data:`SCAN_SCORES`.

        A cut lies outside: changes are counted between two frames of the span only. `phash` is
        the perceptual hash of the middle frame, 16 hexadecimal digits.
        """
        first, last = np.searchsorted(self.times, [start_s - 1e-6, end_s - 1e-6]).tolist()
        # A span shorter than a source frame shows the frame before it.
        first = min(first, last - 1) if last else 0
        span = slice(first, max(last, first + 1))
        luma, change = np.array(self.luma[span]), np.array(self.change[span][1:])
        return {
            "motion": float(change.mean()) if change.size else 0.0,
            "blur": float(np.mean(self.laplacian[span])),
            "brightness": float(luma.mean() / 255.0),
            "black_share": float((luma < BLACK_LUMA).mean()),
            "static_share": float((change < STATIC_CHANGE).mean()) if change.size else 1.0,
            "phash": f"{self.hashes[(span.start + span.stop - 1) // 2]:016x}",
        }


def perceptual_hash(grey: np.ndarray) -> int:
    """64-bit pHash of `uint8 [h, w]`: signs of the low frequencies about their median.

    Pictures that look alike differ in few bits.
    """
    import cv2

    small = cv2.resize(grey, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])  # the first coefficient is only the brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def colourfulness(pictures: Sequence[np.ndarray]) -> float:
    """Mean colourfulness of RGB pictures `uint8 [h, w, 3]`; 0 is grey, above 60 vivid.

    Hasler and Süsstrunk, "Measuring colourfulness in natural images", 2003, Eq. 9.
    """
    values = []
    for picture in pictures:
        red, green, blue = picture.astype(np.float32).transpose(2, 0, 1)
        red_green, yellow_blue = red - green, 0.5 * (red + green) - blue
        spread = np.hypot(red_green.std(), yellow_blue.std())
        offset = np.hypot(red_green.mean(), yellow_blue.mean())
        values.append(float(spread + 0.3 * offset))
    return float(np.mean(values))
