"""The sprite scorer on true, wrong, degraded and empty videos."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from evaluation.sprite_score import read_sprite, score, summarise, true_area
from evaluation.sprites import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SpritePrompt,
    all_prompts,
    render,
)
from streamdit.errors import UserError

ATTRIBUTES = {
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "background": BACKGROUNDS,
}


def degrade(frames: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Blur, noise and JPEG, frame by frame, as a lossy codec or a small autoencoder would."""
    worse = []
    for frame in frames:
        blurred = Image.fromarray(frame).filter(ImageFilter.GaussianBlur(frame.shape[0] / 64))
        noisy = np.asarray(blurred) + generator.normal(0, 10, frame.shape)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=30)
        worse.append(np.asarray(Image.open(file)))
    return np.stack(worse)


@pytest.mark.parametrize(("size", "frames"), [(64, 8), (64, 32), (32, 8)])
def test_every_true_render_scores_right(size, frames):
    generator = np.random.default_rng(size + frames)
    scores = [
        score(render(prompt, frames, size, 16, generator)[0], prompt) for prompt in all_prompts()
    ]
    summary = summarise(scores)
    assert summary["count"] == 288
    assert summary["colour"] == summary["background"] == summary["direction"] == 1.0
    assert summary["shape"] >= 0.97
    assert summary["area_ratio_mean"] == pytest.approx(1.0, abs=0.1)
    assert summary["area_ratio_median"] == pytest.approx(1.0, abs=0.1)


def test_full_size_renders_score_right():
    generator = np.random.default_rng(0)
    prompts = all_prompts()[::9]
    scores = [score(render(prompt, 12, 128, 16, generator)[0], prompt) for prompt in prompts]
    assert summarise(scores)["all_right"] == 1.0


@pytest.mark.parametrize("size", [32, 64, 128])
def test_measured_area_is_the_rendered_one(size):
    generator = np.random.default_rng(5)
    for prompt in all_prompts()[::17]:
        frames, fraction = render(prompt, 8, size, 16, generator)
        assert read_sprite(frames).area == pytest.approx(fraction * size**2, rel=0.1)


def test_degraded_renders_still_score_right():
    generator = np.random.default_rng(1)
    scores = [
        score(degrade(render(prompt, 16, 64, 16, generator)[0], generator), prompt)
        for prompt in all_prompts()[::3]
    ]
    summary = summarise(scores)
    assert summary["colour"] == summary["background"] == summary["direction"] == 1.0
    assert summary["shape"] >= 0.95
    assert summary["area_ratio_mean"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_wrong_attribute_is_wrong_and_the_others_stay_right(attribute):
    generator = np.random.default_rng(2)
    for prompt in all_prompts()[::19]:
        frames, _ = render(prompt, 12, 64, 16, generator)
        for other in ATTRIBUTES[attribute]:
            claimed = dataclasses.replace(prompt, **{attribute: other})
            one = score(frames, claimed)
            for name in ATTRIBUTES:
                assert getattr(one, name) == (name != attribute or claimed == prompt)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_video_has_a_background_and_nothing_else(background):
    frames = np.full((16, 64, 64, 3), BACKGROUNDS[background], np.uint8)
    one = score(frames, SpritePrompt("red", "circle", "left", background))
    assert one.background
    assert (one.colour, one.shape, one.direction) == (False, False, False)
    assert one.area == one.area_ratio == 0.0
    assert one.reading.colour is None


def test_noise_is_no_sprite():
    frames = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    reading = read_sprite(frames)
    assert reading.colour is reading.shape is reading.direction is None


def test_a_faded_sprite_is_no_sprite():
    prompt = SpritePrompt("red", "circle", "left", "brown")
    frames, _ = render(prompt, 16, 64, 16, np.random.default_rng(0))
    paper = np.array(BACKGROUNDS["brown"], float)
    faded = (paper + 0.2 * (frames - paper)).round().astype(np.uint8)
    assert not score(faded, prompt).colour


def test_a_still_sprite_has_no_direction():
    prompt = SpritePrompt("red", "square", "left", "blue")
    frames, _ = render(prompt, 1, 64, 16, np.random.default_rng(0))
    one = score(frames.repeat(16, axis=0), prompt)
    assert (one.colour, one.shape, one.background, one.direction) == (True, True, True, False)


def test_direction_survives_a_few_frames_without_the_sprite():
    prompt = SpritePrompt("green", "circle", "down", "gray")
    frames, _ = render(prompt, 32, 64, 16, np.random.default_rng(0))
    frames[[3, 4, 5, 20]] = BACKGROUNDS["gray"]
    assert score(frames, prompt).direction


def test_an_off_palette_background_is_not_the_nearest_background():
    frames = np.full((8, 64, 64, 3), COLOURS["cyan"], np.uint8)
    assert read_sprite(frames).background is None


def test_area_is_held_against_the_mean_sprite_of_the_shape():
    radii = np.random.default_rng(0).uniform(0.16, 0.20, 200_000)
    expected = np.pi * (radii**2).mean() * 64**2
    assert true_area("circle", 64) == pytest.approx(expected, rel=0.002)
    prompt = SpritePrompt("white", "circle", "up", "black")
    frames, fraction = render(prompt, 8, 64, 16, np.random.default_rng(1))
    one = score(frames, prompt)
    assert one.true_area == true_area("circle", 64)
    assert one.area_ratio == pytest.approx(fraction * 64**2 / one.true_area, rel=0.05)


def test_summary_is_the_mean_of_the_scores():
    generator = np.random.default_rng(0)
    prompt = SpritePrompt("white", "circle", "up", "black")
    claims = [prompt, dataclasses.replace(prompt, colour="red", direction="down")]
    frames, _ = render(prompt, 8, 64, 16, generator)
    scores = [score(frames, claim) for claim in claims]
    summary = summarise(scores)
    assert summary["colour"] == summary["direction"] == summary["all_right"] == 0.5
    assert summary["shape"] == summary["background"] == 1.0
    assert summary["area_ratio_mean"] == pytest.approx(scores[0].area_ratio)
    assert summary["count"] == 2


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((7, 64, 64, 3), np.uint8),
        np.zeros((8, 64, 64, 3), np.float32),
        np.zeros((8, 64, 32, 3), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
    ],
)
def test_unmeasurable_frames_are_refused(frames):
    with pytest.raises(UserError, match="cannot be scored; give"):
        score(frames, SpritePrompt("red", "circle", "left", "blue"))


def test_summary_of_nothing_is_refused():
    with pytest.raises(UserError, match="score at least one video"):
        summarise([])
