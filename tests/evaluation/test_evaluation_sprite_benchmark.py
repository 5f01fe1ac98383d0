"""Figures, intervals and verdicts of the sprite benchmark, on renders whose answers are known."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from evaluation.intervals import (
    difference_interval,
    interval,
    mean_interval,
    share_interval,
    student_t,
    wilson_half,
)
from evaluation.sprite_benchmark import (
    AXES,
    SystemFigures,
    agreement_marks,
    background_flicker,
    marks_by_axis,
    mean_marks,
)
from evaluation.sprite_report import markdown, plot, verdicts
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
    assert marks_by_axis(videos(PROMPTS), PROMPTS, 16.0) == dict.fromkeys(AXES, [True] * 4)
    wrong = [*PROMPTS[:3], SpritePrompt("white", "circle", "left", "brown")]
    found = marks_by_axis(videos(wrong), PROMPTS, 16.0)
    assert found["direction"] == [True, True, True, False]
    assert all(found[axis] == [True] * 4 for axis in ("colour", "shape", "background"))
    assert mean_marks(found) == [1.0, 1.0, 1.0, 0.75]


def test_agreement_is_about_what_is_shown_not_about_pixels():
    other = [*PROMPTS[:3], SpritePrompt("white", "square", "right", "brown")]
    assert agreement_marks(videos(PROMPTS), videos(PROMPTS, seed=1), 16.0) == [True] * 4
    found = agreement_marks(videos(PROMPTS), videos(other), 16.0)
    assert found == [True, True, True, False]


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


def marks(right, of=64, seeds=3):
    return [[True] * right + [False] * (of - right)] * seeds


def test_seeds_that_agree_leave_the_doubt_of_a_finite_number_of_videos():
    # Wilson's lower end of n of n is n / (n + z^2): 192 / 195.84.
    assert share_interval(marks(64)).percent() == "100.0 ± 2.0"
    assert wilson_half(1.0, 192) == pytest.approx(1 - 192 / (192 + 1.96**2))
    # Worked by hand for 81 of 263: 25.5 % to 36.6 %, the further end is the upper one.
    assert wilson_half(81 / 263, 263) == pytest.approx(0.366 - 81 / 263, abs=5e-4)
    # Where seeds differ more than that, Student's t it is.
    apart = [[True] * 64, [True] * 32 + [False] * 32]
    assert share_interval(apart).half == pytest.approx(12.706 * 0.25)
    assert share_interval(marks(64, seeds=1)).half is None


def test_means_of_several_marks_scatter_less_than_yes_and_no():
    means = [[0.5, 0.75, 1.0, 0.75] * 4] * 3
    # By hand: 36 of 48 in sum, 28.5 of their squares, with a 0 and a 1 to each: 50 marks.
    expected = 1.96 * ((29.5 / 50 - (37 / 50) ** 2) / 50) ** 0.5
    found = mean_interval(means)
    assert (found.mean, found.half) == (0.75, pytest.approx(expected))
    assert found.half < 0.5 * wilson_half(0.75, 48)
    assert mean_interval([[0.75] * 16] * 3).half > 0.03
    assert mean_interval([[1.0] * 16] * 3).half > 0.03  # that all agree is no certainty


def test_difference_of_systems_that_never_differ_is_not_certain_either():
    found = difference_interval(marks(60), marks(60))
    # Agresti and Min: half a pair for each way of differing, of 194.
    assert (found.mean, found.half) == (0.0, pytest.approx(1.96 / 194))
    # 8 of 64 videos gained in every seed: 24 pairs of 192, by their formula.
    found = difference_interval(marks(60), marks(52))
    expected = 1.96 * ((25 / 194 - (24 / 194) ** 2) / 194) ** 0.5
    assert (found.mean, found.half) == (pytest.approx(0.125), pytest.approx(expected))


def figures(label, right, seeds=3):
    """A system that has `right` of 64 videos right, by axis or on all of them."""
    by_axis = right if isinstance(right, dict) else dict.fromkeys(AXES, right)
    return SystemFigures(
        label=label,
        right={axis: marks(by_axis[axis], seeds=seeds) for axis in AXES},
        same=marks(60, seeds=seeds),
        drift={1: marks(60, of=64, seeds=seeds), 16: marks(50, seeds=seeds)},
        flicker=[0.1, 0.2, 0.3][:seeds],
        evaluations_per_second=4.0,
        wall_per_second=[1.0, 1.2, 1.1][:seeds],
    )


def test_verdict_needs_the_whole_interval_on_one_side_of_the_goal():
    full = figures("full", {"colour": 64, "shape": 64, "background": 64, "direction": 60})
    few = figures("few", {"colour": 30, "shape": 50, "background": 40, "direction": 58})
    student = figures("student", {"colour": 64, "shape": 57, "background": 42, "direction": 60})
    found = {one.axis: one for one in verdicts([full, few, student])}
    assert [(axis, one.fails, one.gain, one.keeps) for axis, one in found.items()] == [
        ("colour", True, "met", "met"),
        ("shape", True, "not shown", "not met"),  # 10.9 points gained, 10.9 points short
        ("background", True, "not met", "not met"),
        ("direction", False, None, "met"),
    ]
    text = markdown([full, few, student], ["About."])
    assert "| direction | 3.1 ± " in text
    assert "| change from 1 to 16 buffers, points | -15.6 ± " in text
    assert "| same as the full teacher, % | – | 93.8 ± " in text
    assert " | no | – | met |" in text
    assert "not available" not in text


def test_report_says_where_there_is_nothing_to_gain():
    systems = [figures(label, 64) for label in ("full", "few", "student")]
    text = markdown(systems, ["About."])
    assert "No axis fails undistilled, so a gain of 10 points is not available" in text
    assert "100.0 ± 0.0" not in text


def test_report_lists_the_value_of_each_seed():
    systems = [figures(label, 48) for label in ("full", "few", "student")]
    text = markdown(systems, ["About."])
    assert "| shape right, % | 75.0, 75.0, 75.0 | 75.0, 75.0, 75.0 | 75.0, 75.0, 75.0 |" in text
    assert "| background flicker, 8-bit levels | 0.1, 0.2, 0.3 |" in text
    assert "| mean over the axes after 16 buffers, % | 78.1, 78.1, 78.1 |" in text


def test_one_seed_is_reported_without_intervals_or_judgement():
    systems = [figures(label, right, 1) for label, right in (("a", 64), ("b", 30), ("c", 60))]
    text = markdown(systems, ["About."])
    assert "interval" not in text
    assert "±" not in text
    assert " met" not in text
    assert "no goal is judged" in text
    assert {one.keeps for one in verdicts(systems)} == {None}


def test_plot_names_systems_and_axes_and_ends_its_bars_at_a_hundred(tmp_path):
    systems = [figures("full teacher", 64), figures("few", 40), figures("student", 63)]
    tree = ElementTree.parse(plot(systems, tmp_path / "report.svg"))
    texts = {
        "".join(found.itertext()).strip() for found in tree.iter() if found.tag.endswith("text")
    }
    assert {"full teacher", "few", "student", *AXES, "buffer lengths after the start"} <= texts
    again = plot(systems, tmp_path / "again.svg")
    assert again.read_bytes() == (tmp_path / "report.svg").read_bytes()


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (10, 2.228), (11, 2.201), (15, 2.131), (60, 2.000)]
)
def test_students_t_is_that_of_the_tables(freedom, expected):
    assert student_t(freedom) == pytest.approx(expected, abs=1.5e-3)
