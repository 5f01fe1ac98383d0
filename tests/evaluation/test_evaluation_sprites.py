"""The sprite world: prompts, held-out split, plan, rendering and files."""

import itertools
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from evaluation.sheets import read_video
from evaluation.sprites import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    LANE_RANGE,
    SHAPES,
    SPEED_RANGE,
    SpritePrompt,
    SpriteWorldConfig,
    all_prompts,
    coverage,
    held_out_prompts,
    make_world,
    plan_world,
    render,
    training_prompts,
    web_vtt,
)
from streamdit.errors import UserError

SMALL = SpriteWorldConfig(videos=3, shots_per_video=3, shot_seconds=(0.5, 0.8), size=64)


def test_every_caption_parses_back_to_its_prompt():
    captions = [prompt.caption() for prompt in all_prompts()]
    assert len(set(captions)) == 288
    assert [SpritePrompt.parse(caption) for caption in captions] == all_prompts()
    assert captions[0] == "a red circle moving left over a black background"


def test_parse_ignores_case_space_and_full_stop():
    text = "  A white  Square moving\nUP over a gray background. "
    assert SpritePrompt.parse(text) == SpritePrompt("white", "square", "up", "gray")


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "a gray circle moving left over a red background", "a cat on a sofa"],
)
def test_parse_refuses_other_text_in_one_line(text):
    with pytest.raises(UserError, match="not one of the sprite world") as caught:
        SpritePrompt.parse(text)
    assert "\n" not in str(caught.value)


def test_all_colours_stay_apart():
    colours = [np.array(colour) for colour in (COLOURS | BACKGROUNDS).values()]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert len(colours) == 10
    assert min(distances) > 110


def test_held_out_combinations_are_balanced_and_never_in_training():
    config = SpriteWorldConfig()
    held_out, training = held_out_prompts(config), training_prompts(config)
    assert len(held_out) == len(set(held_out)) == 64
    assert set(held_out) | set(training) == set(all_prompts())
    assert not set(held_out) & set(training)
    for attribute in ("colour", "shape", "direction", "background"):
        counts = Counter(getattr(prompt, attribute) for prompt in held_out).values()
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("held_out", [0, 1, 64, 144])
def test_every_pair_of_attribute_values_remains_in_training(held_out):
    training = training_prompts(SpriteWorldConfig(held_out=held_out))
    names = ("colour", "shape", "direction", "background")
    tables = (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)
    for i, j in itertools.combinations(range(4), 2):
        pairs = {(getattr(p, names[i]), getattr(p, names[j])) for p in training}
        assert len(pairs) == len(tables[i]) * len(tables[j])


def test_held_out_combinations_do_not_depend_on_the_seed():
    assert held_out_prompts(SpriteWorldConfig(seed=1)) == held_out_prompts(SpriteWorldConfig())


@pytest.mark.parametrize("seed", range(5))
def test_plan_spreads_prompts_evenly_and_changes_background_at_every_cut(seed):
    config = SpriteWorldConfig(videos=50, shots_per_video=7, seed=seed)
    shots = list(itertools.chain.from_iterable(plan_world(config)))
    counts = Counter(shot.prompt for shot in shots)
    assert set(counts) == set(training_prompts(config))
    assert set(counts.values()) == {1, 2}
    assert all(a.prompt.background != b.prompt.background for a, b in itertools.pairwise(shots))
    assert {shot.frames for shot in shots} == set(range(42, 55))  # 2.6 s to 3.4 s at 16 FPS


def test_a_larger_world_begins_with_the_videos_of_a_smaller_one():
    small, large = SpriteWorldConfig(videos=4), SpriteWorldConfig(videos=60)
    assert plan_world(large)[:4] == plan_world(small)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_sums_to_the_area_wherever_the_sprite_is(shape):
    radius, size = 0.18, 128
    centres = np.random.default_rng(0).uniform(size=(20, 2))
    areas = coverage(shape, centres, radius, size).sum(axis=(1, 2))
    np.testing.assert_allclose(areas, SHAPES[shape] * radius**2 * size**2, rtol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_matches_a_pixel_by_pixel_drawing(shape):
    size, radius, centre = 48, 0.2, (0.1, 0.9)
    drawn = np.zeros((size, size), bool)
    triangle = [(0.0, -1.35), (1.35 * 3**0.5 / 2, 0.675), (-1.35 * 3**0.5 / 2, 0.675)]
    for row, column in itertools.product(range(size), repeat=2):
        # The nearest of the nine copies of the sprite on the plane that the torus unrolls to.
        candidates = [
            (
                ((column + 0.5) / size - centre[0] + dx) / radius,
                ((row + 0.5) / size - centre[1] + dy) / radius,
            )
            for dx, dy in itertools.product((-1, 0, 1), repeat=2)
        ]
        for x, y in candidates:
            if shape == "circle":
                inside = x * x + y * y < 1
            elif shape == "square":
                inside = abs(x) < 0.9 and abs(y) < 0.9
            else:
                inside = all(
                    (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0
                    for (ax, ay), (bx, by) in zip(
                        triangle, triangle[1:] + triangle[:1], strict=True
                    )
                )
            drawn[row, column] |= inside
    covered = coverage(shape, np.array([centre]), radius, size)[0]
    np.testing.assert_array_equal(covered[covered > 0.5] > 0, drawn[covered > 0.5])
    assert drawn.sum() == (covered > 0.5).sum()


@pytest.mark.parametrize(("direction", "step"), DIRECTIONS.items())
def test_motion_is_constant_and_wraps_around(direction, step):
    prompt = SpritePrompt("white", "circle", direction, "black")
    size, fps = 64, 16
    frames, fraction = render(prompt, 160, size, fps, np.random.default_rng(3))
    assert frames.shape == (160, size, size, 3)
    assert frames.dtype == np.uint8
    light = (frames[..., 0].astype(float) - 15) / 230
    np.testing.assert_allclose(light.sum(axis=(1, 2)) / size**2, fraction, rtol=0.03)
    wave = np.exp(2j * np.pi * np.arange(size) / size)
    along, across = (light.sum(axis=1), light.sum(axis=2))[:: 1 if step[0] else -1]
    angles = np.unwrap(np.angle(along @ wave)) / (2 * np.pi)
    moved = np.diff(angles) * sum(step)
    slowest, fastest = SPEED_RANGE
    assert slowest / fps - 0.001 < moved.mean() < fastest / fps + 0.001
    assert moved.std() < 0.001
    assert abs(angles[-1] - angles[0]) > 2  # twice around the torus and still the same speed
    assert np.ptp(np.angle(across @ wave)) < 0.01
    lane = (np.angle(across @ wave) / (2 * np.pi)).mean() % 1.0
    assert LANE_RANGE[0] - 0.02 < lane < LANE_RANGE[1] + 0.02


def test_render_uses_the_colours_of_the_prompt():
    frames, _ = render(
        SpritePrompt("cyan", "square", "up", "brown"), 1, 64, 16, np.random.default_rng(0)
    )
    colours = Counter(map(tuple, frames.reshape(-1, 3).tolist())).most_common(2)
    assert [colour for colour, _ in colours] == [BACKGROUNDS["brown"], COLOURS["cyan"]]


def test_world_on_disk_shows_what_its_sidecars_say(tmp_path):
    progress = []
    videos = make_world(tmp_path, SMALL, lambda done, total: progress.append((done, total)))
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert [video.name for video in videos] == [f"sprites-000{i}.mp4" for i in range(3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [v.name for v in videos] + [v.with_suffix(".vtt").name for v in videos]
    )
    for video, shots in zip(videos, plan_world(SMALL), strict=True):
        frames = read_video(video)
        assert frames.shape == (sum(shot.frames for shot in shots), 64, 64, 3)
        first = 0
        for shot in shots:
            corner = np.median(frames[first : first + shot.frames], axis=(1, 2))
            expected = np.tile(BACKGROUNDS[shot.prompt.background], (shot.frames, 1))
            assert np.abs(corner - expected).max() < 12
            first += shot.frames
        cues = [b for b in video.with_suffix(".vtt").read_text().split("\n\n") if "-->" in b]
        assert [cue.split("\n")[1].strip() for cue in cues] == [s.prompt.caption() for s in shots]


def test_sidecar_times_follow_the_frames():
    shots = plan_world(SMALL)[0]
    blocks = web_vtt(shots, SMALL).split("\n\n")
    assert blocks[0] == "WEBVTT"
    assert blocks[1].startswith("NOTE ")
    begin = 0
    for shot, block in zip(shots, blocks[2:], strict=True):
        end = begin + shot.frames
        times = [
            sum(float(part) * unit for part, unit in zip(t.split(":"), (3600, 60, 1), strict=True))
            for t in block.split("\n")[0].split(" --> ")
        ]
        np.testing.assert_allclose(times, [begin / 16, end / 16], atol=0.0006)
        begin = end


def test_the_same_configuration_gives_the_same_bytes(tmp_path):
    first, second = (make_world(tmp_path / name, SMALL) for name in ("a", "b"))
    assert [v.read_bytes() for v in first] == [v.read_bytes() for v in second]
    other = make_world(tmp_path / "c", SMALL.model_copy(update={"seed": 1}))
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))


def test_complete_videos_are_left_alone_and_incomplete_ones_written_anew(tmp_path):
    videos = make_world(tmp_path, SMALL)
    content = [video.read_bytes() for video in videos]
    untouched = videos[0].stat().st_mtime_ns, videos[0].stat().st_ino
    videos[1].unlink()  # interrupted before the rename
    videos[2].with_suffix(".vtt").write_text("WEBVTT\n")  # belongs to another world
    make_world(tmp_path, SMALL)
    assert (videos[0].stat().st_mtime_ns, videos[0].stat().st_ino) == untouched
    assert [video.read_bytes() for video in videos] == content
    assert "NOTE sprite world" in videos[2].with_suffix(".vtt").read_text()


def test_another_configuration_replaces_the_old_world(tmp_path):
    make_world(tmp_path, SMALL)
    changed = SMALL.model_copy(update={"size": 32})
    assert read_video(make_world(tmp_path, changed)[0]).shape[1:] == (32, 32, 3)


@pytest.mark.parametrize(
    "wrong",
    [{"shot_seconds": (3.0, 2.0)}, {"size": 63}, {"held_out": 200}, {"videos": 0}, {"clips": 3}],
)
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SpriteWorldConfig(**wrong)
