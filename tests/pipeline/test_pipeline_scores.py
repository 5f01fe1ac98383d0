import cv2
import numpy as np
import pytest

from pipeline.scores import FrameScores, colourfulness, perceptual_hash


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
    assert measure([grey(0, 64), texture(1), grey(0, 64)])["phash"] == f"{base:016x}"


def test_colourfulness_follows_its_formula():
    assert colourfulness([grey(120)]) == 0.0
    picture = texture(3).astype(float)
    r, g, b = picture[..., 0], picture[..., 1], picture[..., 2]
    rg, yb = r - g, (r + g) / 2 - b
    by_hand = np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert colourfulness([texture(3)]) == pytest.approx(by_hand, rel=1e-4)
