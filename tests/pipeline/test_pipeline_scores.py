import cv2
import numpy as np
import pytest

from pipeline.scores import FrameScores, border_share, colourfulness, perceptual_hash


def measure(pictures, start_s=0.0, end_s=100.0, fps=10.0):
    scores = FrameScores()
    for i, picture in enumerate(pictures):
        scores.add(i / fps, picture)
    return scores.summarise(start_s, end_s)


def grey(level, size=32):
    return np.full((size, size, 3), level, np.uint8)


def texture(seed=0, size=64):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def test_motion_is_the_mean_change_of_luma():
    assert measure([grey(10), grey(14), grey(20)])["motion"] == pytest.approx(5.0)
    assert measure([grey(90)] * 5)["motion"] == 0.0


def test_a_cut_outside_the_span_does_not_count_as_motion():
    pictures = [grey(0)] * 5 + [grey(200)] * 5
    assert measure(pictures, 0.0, 0.5)["motion"] == 0.0
    assert measure(pictures, 0.5, 1.0)["motion"] == 0.0
    assert measure(pictures, 0.0, 1.0)["motion"] == pytest.approx(200 / 9)


def test_brightness_black_and_static_shares():
    scores = measure([grey(0), grey(0), grey(102), grey(102), grey(102)])
    assert scores["brightness"] == pytest.approx(0.6 * 102 / 255)
    assert scores["black_share"] == pytest.approx(0.4)
    assert scores["static_share"] == pytest.approx(0.75)


def test_blur_falls_when_a_picture_is_blurred():
    sharp = texture()
    soft = cv2.GaussianBlur(sharp, (0, 0), 4)
    assert measure([soft])["blur"] < 0.3 * measure([sharp])["blur"]
    by_hand = cv2.Laplacian(cv2.cvtColor(sharp, cv2.COLOR_RGB2GRAY).astype(np.float64), -1).var()
    assert measure([sharp])["blur"] == pytest.approx(by_hand, rel=1e-3)


def test_perceptual_hash_survives_rescaling_and_tells_pictures_apart():
    def bits(picture):
        return perceptual_hash(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))

    base = bits(texture(1))
    smaller = bits(cv2.resize(texture(1), (48, 48), interpolation=cv2.INTER_AREA))
    assert (base ^ smaller).bit_count() <= 4
    assert (base ^ bits(texture(2))).bit_count() >= 16
    other = bits(texture(2))
    joined = measure([texture(2), texture(1), texture(2)], 0.0, 0.3)["phash"]
    assert joined == f"{other:016x}{base:016x}{other:016x}"


def test_perceptual_hash_is_the_sign_of_the_low_frequencies_of_the_shrunken_picture():
    for seed, shape in enumerate([(64, 64), (180, 320), (144, 193), (90, 51), (20, 30)]):
        picture = cv2.cvtColor(texture(seed, 200), cv2.COLOR_RGB2GRAY)[: shape[0], : shape[1]]
        picture = cv2.resize(picture, shape[::-1])
        areas = picture.astype(np.float64)
        for axis, length in enumerate(shape):  # every pixel cut into 32 parts, 32 areas averaged
            areas = np.repeat(areas, 32, axis)
            areas = areas.reshape(*areas.shape[:axis], 32, length, *areas.shape[axis + 1 :])
            areas = areas.mean(axis + 1)
        low = cv2.dct(areas)[:8, :8].ravel()
        expected = int("".join("01"[int(v > np.median(low[1:]))] for v in low), 2)
        # A coefficient next to the median may fall on either side by rounding.
        assert (perceptual_hash(picture) ^ expected).bit_count() <= 1


def framed(top, bottom, left, right, rows=60, columns=100):
    picture = np.zeros((rows, columns, 3), np.uint8)
    picture[top : rows - bottom, left : columns - right] = (
        texture(5, 128)[: rows - top - bottom, : columns - left - right] // 2 + 100
    )
    return picture


def test_letterbox_is_the_area_that_stays_black_in_all_frames():
    assert measure([framed(0, 0, 0, 0)])["letterbox"] == 0.0
    bars = [framed(6, 12, 0, 0), framed(9, 12, 0, 10)]
    assert measure(bars)["letterbox"] == pytest.approx(18 / 60)
    pillars = measure([framed(0, 0, 20, 20)] * 3)["letterbox"]
    assert pillars == pytest.approx(0.4)
    window = measure([framed(15, 15, 25, 25)])["letterbox"]
    assert window == pytest.approx(0.75)
    assert measure([np.zeros_like(bars[0]), *bars])["letterbox"] == pytest.approx(0.3)
    assert measure([grey(0)])["letterbox"] == 0.0
    assert border_share([None, None]) == 0.0


def test_slowly_changing_scores_are_sampled_and_quick_ones_measured_on_every_frame():
    sharp, soft = texture(1), cv2.GaussianBlur(texture(1), (0, 0), 4)
    scores = FrameScores()
    for i in range(120):
        scores.add(i / 60, sharp if i % 2 else soft)
    assert len(scores.times) == 120
    assert len(scores.sampled) == 20
    assert np.diff(scores.sampled) == pytest.approx(0.1)
    short = scores.summarise(1.01, 1.03)  # lies between two samples: the one before counts
    assert short["blur"] == pytest.approx(measure([soft])["blur"])


def test_colourfulness_follows_its_formula():
    assert colourfulness([grey(120)]) == 0.0
    picture = texture(3).astype(float)
    r, g, b = picture[..., 0], picture[..., 1], picture[..., 2]
    rg, yb = r - g, (r + g) / 2 - b
    by_hand = np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert colourfulness([texture(3)]) == pytest.approx(by_hand, rel=1e-4)
