"""Figures of the sprite benchmark, on renders whose answers are known."""

import numpy as np
import pytest

from evaluation.sprite_benchmark import (
    SystemFigures,
    accuracies,
    agreement,
    background_flicker,
    difference,
    interval,
    markdown,
    plot,
)
from evaluation.sprites import SpritePrompt, render

PROMPTS = [
    SpritePrompt("red", "circle", "left", "blue"),
    SpritePrompt("yellow", "square", "down", "black"),
    SpritePrompt("green", "triangle", "up", "gray"),
    SpritePrompt("white", "circle", "right", "brown"),
]


def videos(prompts, seed=0):
    generator = np.random.default_rng(seed)
    return np.stack([render(prompt, 32, 64, 16.0, generator)[0] for prompt in prompts])


def test_true_videos_are_right_on_every_axis_and_one_wrong_axis_counts_alone():
    assert set(accuracies(videos(PROMPTS), PROMPTS, 16.0).values()) == {1.0}
    wrong = [*PROMPTS[:3], SpritePrompt("white", "circle", "left", "brown")]
    found = accuracies(videos(wrong), PROMPTS, 16.0)
    assert found == {"colour": 1.0, "shape": 1.0, "background": 1.0, "direction": 0.75}


def test_agreement_is_about_what_is_shown_not_about_pixels():
    other = [*PROMPTS[:3], SpritePrompt("white", "square", "right", "brown")]
    assert agreement(videos(PROMPTS), videos(PROMPTS, seed=1), 16.0) == 1.0
    assert agreement(videos(PROMPTS), videos(other), 16.0) == 0.75


def test_motion_is_no_flicker_but_a_pulsing_background_is():
    steady = videos(PROMPTS)
    assert background_flicker(steady) == 0.0
    pulsing = steady.copy()
    pulsing[:, ::2] = np.clip(pulsing[:, ::2].astype(int) + 6, 0, 255)
    assert background_flicker(pulsing) == pytest.approx(6.0)


def test_interval_is_students_over_the_seeds():
    # Worked by hand: mean 2, deviation 1, t(2 degrees of freedom) = 4.303, over sqrt(3).
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert interval([0.5]).half is None
    assert interval([0.5]).percent() == "50.0"
    assert interval([0.5, 0.5]).percent() == "50.0 ± 0.0"


def figures(label, accuracy):
    axes = ("colour", "shape", "background", "direction")
    return SystemFigures(
        label=label,
        accuracy=dict.fromkeys(axes, accuracy),
        flicker=[0.1, 0.2],
        agreement=[1.0, 0.9],
        drift={1: accuracy, 4: accuracy},
        evaluations_per_second=4.0,
        wall_per_second=[1.0, 1.2],
    )


def test_report_compares_pairs_of_the_same_seed(tmp_path):
    systems = [
        figures("full", [0.9, 1.0]),
        figures("few", [0.5, 0.6]),
        figures("student", [0.8, 0.9]),
    ]
    gain = difference(systems[2], systems[1], "shape")
    assert (gain.mean, gain.half) == (pytest.approx(0.3), pytest.approx(0.0, abs=1e-9))
    text = markdown(systems, "About.")
    assert "| shape | 30.0 ± 0.0 | -10.0 ± 0.0 |" in text
    assert "| all axes after 4 buffers, % |" in text
    svg = plot(systems, tmp_path / "report.svg").read_text()
    assert svg.startswith("<?xml")
    assert "buffer lengths after the start" in svg or "<path" in svg
