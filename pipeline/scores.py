"""Scores of clips. They are only written; which clips to keep is the selection's business."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

BLACK_LUMA = 20.0
BORDER_LUMA = 40
STATIC_CHANGE = 0.25
STILL_CHANGE = 12
"""Grey levels by which compression alone may change a pixel of a still picture."""
HASH_SIDE = 32
HASH_PICTURES = 3
SAMPLES_PER_S = 10.0

SCAN_SCORES = {
    "motion": "mean change of luma between consecutive source frames, in grey levels (0-255)",
    "blur": "mean variance of the Laplacian of luma; low is blurred",
    "brightness": "mean luma, 0-1",
    "black_share": f"share of frames with mean luma below {BLACK_LUMA:g} of 255",
    "static_share": f"share of frame pairs that change by less than {STATIC_CHANGE:g} grey levels",
    "letterbox": "share of the picture that is black border in every frame, 0-1",
}
"""Name and meaning of every number that the low-resolution pass gives."""


class FrameScores:
    """Measures frames one by one, and sums up any span of them afterwards.

    Luma and its change are measured on every frame; sharpness, borders and hash change slowly and
    are measured on about ten frames a second.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.luma: list[float] = []
        self.change: list[float] = []
        self.sampled: list[float] = []
        self.laplacian: list[float] = []
        self.borders: list[tuple[float, float, float, float] | None] = []
        self.hashes: list[int] = []
        self.is_still = True
        """Whether no frame so far shows anything else than the first, anywhere in the picture."""
        self._first: np.ndarray | None = None
        self._previous: np.ndarray | None = None
        self._next_sample = float("-inf")

    def add(self, time_s: float, picture: np.ndarray) -> None:
        """Measure the next frame: its presentation time and RGB `uint8 [h, w, 3]`."""
        import cv2

        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        previous = grey if self._previous is None else self._previous
        self.times.append(time_s)
        self.luma.append(cv2.mean(grey)[0])
        self.change.append(cv2.norm(grey, previous, cv2.NORM_L1) / grey.size)
        self._previous = grey
        if self.is_still:
            self._first = grey if self._first is None else self._first
            self.is_still = cv2.norm(grey, self._first, cv2.NORM_INF) <= STILL_CHANGE
        if time_s + 1e-3 >= self._next_sample:
            self._next_sample = time_s + 1 / SAMPLES_PER_S
            self.sampled.append(time_s)
            self.laplacian.append(laplacian_variance(grey))
            self.borders.append(black_borders(grey))
            self.hashes.append(perceptual_hash(grey))

    def summarise(self, start_s: float, end_s: float) -> dict[str, float | str]:
        """Scores of the frames shown first in `[start_s, end_s)`, see :data:`SCAN_SCORES`.

        A cut lies outside: changes are counted between two frames of the span only. `phash` joins
        the perceptual hashes of three frames at 1/6, 1/2 and 5/6 of the span, 16 hexadecimal
        digits each.
        """
        span = _span(self.times, start_s, end_s)
        samples = _span(self.sampled, start_s, end_s)
        luma, change = np.array(self.luma[span]), np.array(self.change[span][1:])
        return {
            "motion": float(change.mean()) if change.size else 0.0,
            "blur": float(np.mean(self.laplacian[samples])),
            "brightness": float(luma.mean() / 255.0),
            "black_share": float((luma < BLACK_LUMA).mean()),
            "static_share": float((change < STATIC_CHANGE).mean()) if change.size else 1.0,
            "letterbox": border_share(self.borders[samples]),
            "phash": self._phash(start_s, end_s),
        }

    def _phash(self, start_s: float, end_s: float) -> str:
        """Hashes of the sampled frames nearest to the middles of equal parts of a span."""
        sampled = np.array(self.sampled)
        parts = (np.arange(HASH_PICTURES) + 0.5) / HASH_PICTURES
        nearest = [
            int(np.abs(sampled - time_s).argmin()) for time_s in start_s + parts * (end_s - start_s)
        ]
        return "".join(f"{self.hashes[i]:016x}" for i in nearest)


def _span(times: Sequence[float], start_s: float, end_s: float) -> slice:
    """Frames shown first in `[start_s, end_s)`; a shorter span shows the frame before it."""
    first, last = np.searchsorted(times, [start_s - 1e-6, end_s - 1e-6]).tolist()
    first = min(first, last - 1) if last else 0
    return slice(first, max(last, first + 1))


def laplacian_variance(grey: np.ndarray) -> float:
    """Variance of the Laplacian of `uint8 [h, w]`, a measure of sharpness."""
    import cv2

    _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    return float(np.ravel(deviation)[0] ** 2)


def black_borders(grey: np.ndarray) -> tuple[float, float, float, float] | None:
    """Shares of `uint8 [h, w]` that are black at the top, bottom, left and right.

    None for a picture that is black all over, which tells nothing about borders.
    """
    rows = np.flatnonzero(grey.max(axis=1) >= BORDER_LUMA)
    if not rows.size:
        return None
    columns = np.flatnonzero(grey.max(axis=0) >= BORDER_LUMA)
    height, width = grey.shape
    return (
        float(rows[0] / height),
        float(1 - (rows[-1] + 1) / height),
        float(columns[0] / width),
        float(1 - (columns[-1] + 1) / width),
    )


def border_share(borders: Sequence[tuple[float, float, float, float] | None]) -> float:
    """Share of the picture that is border in all frames; 0 where all frames are black."""
    known = [sides for sides in borders if sides is not None]
    if not known:
        return 0.0
    top, bottom, left, right = np.min(known, axis=0)
    return float(max(0.0, 1 - (1 - top - bottom) * (1 - left - right)))


def perceptual_hash(grey: np.ndarray) -> int:
    """64-bit pHash of `uint8 [h, w]`: signs of the low frequencies about their median.

    Pictures that look alike differ in few bits.
    """
    height, width = grey.shape
    low = (_low_frequencies(height) @ grey.astype(np.float32) @ _low_frequencies(width).T).ravel()
    bits = low > np.median(low[1:])  # the first coefficient is only the brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.lru_cache(maxsize=64)
def _low_frequencies(length: int) -> np.ndarray:
    """Float32 `[8, length]`: averages `length` pixels into 32 areas, and takes a DCT of those.

    One product with it costs a fraction of resizing and transforming the picture.
    """
    import cv2

    edges = np.linspace(0, length, HASH_SIDE + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    areas = np.clip(overlap, 0, None) * HASH_SIDE / length
    cosines = cv2.dct(np.eye(HASH_SIDE), flags=cv2.DCT_ROWS).T
    return (cosines[:8] @ areas).astype(np.float32)


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
