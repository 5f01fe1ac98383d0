"""The sprite world: endless video of one coloured shape moving over a coloured background.

A prompt names four attributes (colour, shape, direction, background), so there are
6 · 3 · 4 · 4 = 288 of them, and :mod:`evaluation.sprite_score` can tell exactly which ones a
generated video got right. The frame is a torus: a sprite that leaves on one side comes in on the
other, so every window of time looks alike and a stream never runs out of scene.

Lengths are fractions of the frame's width and speeds are frame widths per second; positions are
(x, y) with y downwards.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator

from evaluation.sheets import write_video
from streamdit.config import StrictModel
from streamdit.errors import UserError

Colour = tuple[int, int, int]

# All ten colours are at least 110 apart in RGB, so that the blur and the colour error of a small
# autoencoder do not turn one into another.
COLOURS: dict[str, Colour] = {
    "red": (235, 40, 45),
    "yellow": (245, 215, 40),
    "green": (40, 190, 70),
    "cyan": (60, 215, 235),
    "magenta": (235, 70, 200),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (15, 15, 15),
    "gray": (130, 130, 135),
    "blue": (30, 60, 190),
    "brown": (120, 70, 20),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
# A sprite of radius r is a circle of radius r, a square of half-side 0.9 r or an upright
# equilateral triangle of circumradius 1.35 r: similar sizes, so that size does not give the
# shape away. The number is the shape's area at r = 1.
SQUARE_HALF_SIDE = 0.9
TRIANGLE_CIRCUMRADIUS = 1.35
SHAPES: dict[str, float] = {
    "circle": math.pi,
    "square": (2 * SQUARE_HALF_SIDE) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * TRIANGLE_CIRCUMRADIUS**2,
}

RADIUS_RANGE = (0.16, 0.20)
SPEED_RANGE = (0.45, 0.55)
LANE_RANGE = (0.4, 0.6)
EDGE_PIXELS = 1.5


@dataclass(frozen=True)
class SpritePrompt:
    """What a sprite video shows; each field is a key of the table of the same kind."""

    colour: str
    shape: str
    direction: str
    background: str

    def caption(self) -> str:
        """The prompt as a sentence: `a red circle moving left over a blue background`."""
        return (
            f"a {self.colour} {self.shape} moving {self.direction} "
            f"over a {self.background} background"
        )

    @staticmethod
    def parse(text: str) -> SpritePrompt:
        """Read a caption back; case, surrounding space and a final full stop do not matter.

        Raises:
            UserError: if `text` is not a caption of the sprite world.
        """
        match = CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
        if match is None:
            raise UserError(
                f"prompt {text!r} is not one of the sprite world; write it like "
                "'a red circle moving left over a blue background' with "
                f"colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)}, "
                f"directions {', '.join(DIRECTIONS)}, backgrounds {', '.join(BACKGROUNDS)}"
            )
        return SpritePrompt(**match.groupdict())


CAPTION = re.compile(
    rf"a (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"moving (?P<direction>{'|'.join(DIRECTIONS)}) "
    rf"over a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


class SpriteWorldConfig(StrictModel):
    """Size of a sprite world on disk, and which prompts it never shows."""

    videos: int = Field(default=48, gt=0)
    """Number of mp4 files."""
    shots_per_video: int = Field(default=5, gt=0)
    """Shots in a file, joined by hard cuts."""
    shot_seconds: tuple[float, float] = (2.6, 3.4)
    """Shortest and longest shot."""
    size: int = Field(default=128, ge=32, multiple_of=2)
    """Width and height in pixels."""
    fps: int = Field(default=16, gt=0)
    """Frames per second."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything drawn at random."""
    held_out: int = Field(default=64, ge=0, le=144)
    """Attribute combinations, of 288, that are kept for evaluation and never rendered here."""

    @field_validator("shot_seconds")
    @classmethod
    def _check_range(cls, seconds: tuple[float, float]) -> tuple[float, float]:
        if not 0.5 <= seconds[0] <= seconds[1]:
            raise ValueError(
                f"shot_seconds {list(seconds)} is not a range of at least half a second; "
                "give [shortest, longest]"
            )
        return seconds


def all_prompts() -> list[SpritePrompt]:
    """The 288 prompts, in a fixed order."""
    return [
        SpritePrompt(*values)
        for values in itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)
    ]


def held_out_prompts(config: SpriteWorldConfig) -> list[SpritePrompt]:
    """Prompts that training never shows together, the same for every seed.

    Chosen one by one among those whose attribute values, and pairs of values, were chosen least
    so far; so each single value and each pair of values still occurs in training.
    """
    prompts = all_prompts()
    remaining = [prompts[index] for index in np.random.default_rng(288).permutation(len(prompts))]
    chosen: list[SpritePrompt] = []
    seen: Counter[tuple[tuple[str, str], ...]] = Counter()
    for _ in range(config.held_out):
        prompt = min(remaining, key=lambda p: [sum(seen[k] for k in ks) for ks in _facets(p)])
        remaining.remove(prompt)
        chosen.append(prompt)
        seen.update(itertools.chain.from_iterable(_facets(prompt)))
    return chosen


def _facets(prompt: SpritePrompt) -> list[list[tuple[tuple[str, str], ...]]]:
    """Single attribute values of a prompt, then its pairs of values."""
    values = list(vars(prompt).items())
    return [list(itertools.combinations(values, count)) for count in (1, 2)]


def training_prompts(config: SpriteWorldConfig) -> list[SpritePrompt]:
    """Prompts that the world shows: all that are not held out."""
    held_out = set(held_out_prompts(config))
    return [prompt for prompt in all_prompts() if prompt not in held_out]


def coverage(
    shape: str, centres: np.ndarray, radius: float, size: int, edge_pixels: float = EDGE_PIXELS
) -> np.ndarray:
    """How much of each pixel a sprite covers.

    Args:
        shape: a key of `SHAPES`.
        centres: `[n, 2]` positions (x, y); they wrap around.
        radius: the sprite's radius.
        size: width and height in pixels.
        edge_pixels: width of the soft edge. It is symmetric about the true outline, so the sum
            over the frame is the sprite's area.

    Returns:
        float32 `[n, size, size]` in 0...1.
    """
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    offsets = (pixels - centres[..., None].astype(np.float32) + 0.5) % 1.0 - 0.5  # [n, 2, size]
    x, y = offsets[:, 0, None, :], offsets[:, 1, :, None]
    outside = _distance(shape, x, y, radius) * size
    return np.clip(0.5 - outside / edge_pixels, 0.0, 1.0).astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance of points from a sprite's outline at the origin; negative inside."""
    if shape == "circle":
        return np.sqrt(x**2 + y**2) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF_SIDE * radius
    assert shape == "triangle", shape
    slope = math.sqrt(3) / 2 * np.abs(x) - y / 2
    return np.maximum(slope, y) - TRIANGLE_CIRCUMRADIUS / 2 * radius


def render(
    prompt: SpritePrompt, frames: int, size: int, fps: float, generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Draw one shot; start, radius and speed come from `generator`.

    Returns:
        uint8 `[frames, size, size, 3]`, and the fraction of the frame that the sprite covers.
    """
    # Along its way a sprite starts anywhere; across it, it keeps to a lane through the middle.
    start = np.array([generator.uniform(), generator.uniform(*LANE_RANGE)])
    if DIRECTIONS[prompt.direction][0] == 0:
        start = start[::-1]
    radius = generator.uniform(*RADIUS_RANGE)
    speed = generator.uniform(*SPEED_RANGE)
    seconds = np.arange(frames)[:, None] / fps
    centres = start + seconds * speed * np.array(DIRECTIONS[prompt.direction])
    covered = coverage(prompt.shape, centres, radius, size)[..., None]
    background = np.array(BACKGROUNDS[prompt.background], np.float32)
    sprite = np.array(COLOURS[prompt.colour], np.float32)
    pixels = background + covered * (sprite - background)
    return pixels.round().astype(np.uint8), SHAPES[prompt.shape] * radius**2


@dataclass(frozen=True)
class Shot:
    """One shot of a video: what it shows and for how many frames."""

    prompt: SpritePrompt
    frames: int


def plan_world(config: SpriteWorldConfig) -> list[list[Shot]]:
    """Shots of every video.

    The training prompts are dealt round after round, so their counts differ by one at most;
    consecutive shots differ in background, so a cut is a cut.
    """
    prompts = training_prompts(config)
    generator = np.random.default_rng(config.seed)
    deck: list[SpritePrompt] = []
    while len(deck) < config.videos * config.shots_per_video:
        deck += _deal(prompts, deck[-1:], generator)
    cards = iter(deck)
    return [
        [Shot(next(cards), frames) for frames in _shot_lengths(config, number)]
        for number in range(config.videos)
    ]


def _shot_lengths(config: SpriteWorldConfig, number: int) -> list[int]:
    """Frames of each shot of video `number`."""
    shortest, longest = (round(seconds * config.fps) for seconds in config.shot_seconds)
    generator = np.random.default_rng([config.seed, number, 0])
    return generator.integers(shortest, longest + 1, size=config.shots_per_video).tolist()


def _deal(
    prompts: list[SpritePrompt], previous: list[SpritePrompt], generator: np.random.Generator
) -> list[SpritePrompt]:
    """All `prompts` in random order, no background twice in a row (nor like `previous`)."""
    piles: dict[str, list[SpritePrompt]] = {name: [] for name in BACKGROUNDS}
    for index in generator.permutation(len(prompts)):
        piles[prompts[index].background].append(prompts[index])
    dealt = list(previous)
    for _ in prompts:
        # Taking from a highest pile keeps the piles level, so the last cards never clash.
        open_piles = [name for name in piles if not dealt or name != dealt[-1].background]
        top = max(len(piles[name]) for name in open_piles)
        highest = [name for name in open_piles if len(piles[name]) == top]
        dealt.append(piles[highest[generator.integers(len(highest))]].pop())
    return dealt[len(previous) :]


def make_world(
    folder: Path | str,
    config: SpriteWorldConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the world: `sprites-0000.mp4` … with a WebVTT sidecar of captions for each.

    The files depend on `config` alone. A video that an earlier run completed with the same
    configuration is left alone; one that it did not complete is written anew.

    Args:
        folder: where to write; created if missing.
        config: what to write.
        on_progress: called with (videos done, videos in all) after each one.

    Returns:
        The mp4 files, in order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    videos = []
    for number, shots in enumerate(plan_world(config)):
        video = folder / f"sprites-{number:04d}.mp4"
        _write_shots(video, shots, config, number)
        videos.append(video)
        if on_progress is not None:
            on_progress(number + 1, config.videos)
    return videos


def _write_shots(video: Path, shots: list[Shot], config: SpriteWorldConfig, number: int) -> None:
    """Write the sidecar, then the video; the video's name appears only when both are whole."""
    sidecar = video.with_suffix(".vtt")
    cues = web_vtt(shots, config)
    if video.exists() and sidecar.exists() and sidecar.read_text(encoding="utf-8") == cues:
        return
    video.unlink(missing_ok=True)
    partial = sidecar.with_suffix(".vtt.partial")
    partial.write_text(cues, encoding="utf-8")
    os.replace(partial, sidecar)
    generator = np.random.default_rng([config.seed, number, 1])
    frames = [
        render(shot.prompt, shot.frames, config.size, config.fps, generator)[0] for shot in shots
    ]
    write_video(video, np.concatenate(frames), config.fps)


def web_vtt(shots: list[Shot], config: SpriteWorldConfig) -> str:
    """WebVTT text with one cue per shot; a note names the configuration that it belongs to."""
    settings = json.dumps(config.model_dump(exclude={"videos"}), sort_keys=True)
    blocks = ["WEBVTT", f"NOTE sprite world {settings}"]
    first = 0
    for shot in shots:
        begin, end = first / config.fps, (first + shot.frames) / config.fps
        blocks.append(f"{_timestamp(begin)} --> {_timestamp(end)}\n{shot.prompt.caption()}")
        first += shot.frames
    return "\n\n".join(blocks) + "\n"


def _timestamp(seconds: float) -> str:
    """`hh:mm:ss.mmm`, as WebVTT writes times."""
    milliseconds = round(seconds * 1000)
    return (
        f"{milliseconds // 3_600_000:02d}:{milliseconds // 60_000 % 60:02d}:"
        f"{milliseconds // 1000 % 60:02d}.{milliseconds % 1000:03d}"
    )
