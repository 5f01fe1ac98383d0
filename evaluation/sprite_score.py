"""The exact scorer of the sprite world: which attributes of a prompt a video got right.

The measurement works on any sprite-like video, not only on perfect renders: it takes the
background as what most of each frame shows, the sprite as what departs from it in the direction
of one colour, and reads shape and motion from the sprite's coverage of each frame. Blur, noise
and the colour error of a small autoencoder move these little.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from evaluation.sprites import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    RADIUS_RANGE,
    SHAPES,
    SPEED_RANGE,
    Colour,
    SpritePrompt,
    coverage,
)
from streamdit.errors import UserError

MIN_FRAMES = 8
# Less than half the distance of the two colours nearest to each other.
FOREGROUND_DISTANCE = 50.0
# A sprite of the world covers 0.06 to 0.13 of the frame; below this there is none.
MIN_AREA = 0.005
# Displacement that counts as motion, as a part of what the slowest sprite would cover.
MIN_MOTION = 0.25
TEMPLATE_RADII = np.linspace(0.08, 0.32, 25)
TEMPLATE_BLURS = (0.0, 0.02, 0.04)


class SpriteReading(BaseModel):
    """What a video shows; None where nothing of the kind can be made out."""

    model_config = ConfigDict(frozen=True)

    background: str | None
    """Nearest of the world's backgrounds."""
    colour: str | None
    """Nearest of the world's sprite colours."""
    shape: str | None
    """Best matching shape."""
    direction: str | None
    """Main direction of motion; None if the sprite stands still."""
    area: float
    """Mean foreground area in pixels."""


class SpriteScore(BaseModel):
    """A video held against its prompt."""

    model_config = ConfigDict(frozen=True)

    colour: bool
    """Whether the sprite has the prompt's colour."""
    shape: bool
    """Whether it has the prompt's shape."""
    direction: bool
    """Whether it moves in the prompt's direction."""
    background: bool
    """Whether the background has the prompt's colour."""
    area: float
    """Mean foreground area in pixels."""
    true_area: float
    """Area in pixels that a sprite of this shape has on average in the world."""
    area_ratio: float
    """`area / true_area`."""
    reading: SpriteReading
    """What was seen instead."""


def score(frames: np.ndarray, prompt: SpritePrompt, fps: float = 16.0) -> SpriteScore:
    """Hold a video against its prompt.

    Args:
        frames: uint8 `[n, H, W, 3]` with n ≥ 8 and H = W.
        prompt: what it should show.
        fps: frames per second, which says how far a sprite should have moved.

    Raises:
        UserError: if the frames are too few or not square RGB bytes.
    """
    reading = read_sprite(frames, fps)
    area = true_area(prompt.shape, frames.shape[1])
    return SpriteScore(
        colour=reading.colour == prompt.colour,
        shape=reading.shape == prompt.shape,
        direction=reading.direction == prompt.direction,
        background=reading.background == prompt.background,
        area=reading.area,
        true_area=area,
        area_ratio=reading.area / area,
        reading=reading,
    )


def summarise(scores: Sequence[SpriteScore]) -> dict[str, float]:
    """Accuracies per attribute and of all four together, area ratios, and their count.

    Raises:
        UserError: if there are no scores.
    """
    if not scores:
        raise UserError("no sprite scores to summarise; score at least one video")
    attributes = ("colour", "shape", "direction", "background")
    right = [[getattr(one, attribute) for attribute in attributes] for one in scores]
    summary = dict(zip(attributes, np.mean(right, axis=0).tolist(), strict=True))
    summary["all_right"] = float(np.mean([all(row) for row in right]))
    summary["area_ratio_mean"] = statistics.fmean(one.area_ratio for one in scores)
    summary["area_ratio_median"] = statistics.median(one.area_ratio for one in scores)
    summary["count"] = float(len(scores))
    return summary


def true_area(shape: str, size: int) -> float:
    """Mean area in pixels of the world's sprites of a shape, at `size` × `size` pixels."""
    low, high = RADIUS_RANGE
    mean_squared_radius = (low**2 + low * high + high**2) / 3
    return SHAPES[shape] * mean_squared_radius * size**2


def read_sprite(frames: np.ndarray, fps: float = 16.0) -> SpriteReading:
    """Read the four attributes and the area off a video; arguments as for :func:`score`."""
    if frames.ndim != 4 or frames.shape[1] != frames.shape[2] or frames.shape[3] != 3:
        raise UserError(f"frames of shape {list(frames.shape)} cannot be scored; give [n, H, H, 3]")
    if frames.dtype != np.uint8 or len(frames) < MIN_FRAMES:
        raise UserError(
            f"{len(frames)} frames of {frames.dtype} cannot be scored; give at least "
            f"{MIN_FRAMES} frames of uint8"
        )
    pixels = frames.astype(np.float32)
    paper = np.median(pixels, axis=(1, 2), keepdims=True)  # [n, 1, 1, 3]
    background = _name_of(np.median(paper, axis=0).ravel(), BACKGROUNDS)
    departure = pixels - paper
    ink = _ink(departure)
    if ink is None:
        return SpriteReading(
            background=background, colour=None, shape=None, direction=None, area=0.0
        )
    covered = _covered(departure, ink)
    return SpriteReading(
        background=background,
        colour=_name_of(np.median(paper, axis=0).ravel() + ink, COLOURS),
        shape=_shape_of(covered),
        direction=_direction_of(covered, fps),
        area=float(covered.sum(axis=(1, 2)).mean()),
    )


def _name_of(colour: np.ndarray, palette: Mapping[str, Colour]) -> str | None:
    """Name of the nearest of the ten colours, if it is one of `palette`."""
    everything = {**COLOURS, **BACKGROUNDS}
    nearest = min(everything, key=lambda name: float(np.linalg.norm(colour - everything[name])))
    return nearest if nearest in palette else None


def _ink(departure: np.ndarray) -> np.ndarray | None:
    """Colour of the sprite's core minus the background's, `[3]`, or None without a sprite.

    The core is what departs most: soft edges and smeared colours lie between it and the
    background.
    """
    distance = np.linalg.norm(departure, axis=-1)
    foreground = distance > FOREGROUND_DISTANCE
    if foreground.mean() < MIN_AREA:
        return None
    core = distance >= 0.7 * np.quantile(distance[foreground], 0.9)
    ink = np.median(departure[core], axis=0)
    # Departures in every direction, such as noise, cancel: they are no sprite.
    return ink if np.linalg.norm(ink) > FOREGROUND_DISTANCE / 2 else None


def _covered(departure: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Coverage `[n, H, W]` in 0...1 of each pixel by the sprite.

    The share of `ink` in each pixel, steepened about one half: this drops the background's noise
    and blur's tails but keeps the area, because an edge that blurs evenly crosses one half where
    it was.
    """
    share = departure @ (ink / (ink @ ink))
    return np.clip(2.0 * share - 0.5, 0.0, 1.0)


def _centres(covered: np.ndarray) -> np.ndarray:
    """Circular mean `[n, 2]` (x, y) of coverage `[n, H, H]`, in fractions of the frame."""
    size = covered.shape[-1]
    wave = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)
    along = np.stack([covered.sum(axis=1) @ wave, covered.sum(axis=2) @ wave], axis=-1)
    return (np.angle(along) / (2 * np.pi)) % 1.0


def _seen(covered: np.ndarray) -> np.ndarray:
    """Which frames show enough of the sprite to be measured, `[n]` bool."""
    return covered.mean(axis=(1, 2)) >= MIN_AREA


def _direction_of(covered: np.ndarray, fps: float) -> str | None:
    """Direction of the straight line through the sprite's centres over time."""
    times = np.flatnonzero(_seen(covered)) / fps
    if len(times) < MIN_FRAMES // 2:
        return None
    path = np.unwrap(_centres(covered[_seen(covered)]), axis=0, period=1.0)
    velocity = np.polyfit(times, path, deg=1)[0]  # [2], frame widths per second
    axis = int(np.abs(velocity).argmax())
    if abs(velocity[axis]) < MIN_MOTION * SPEED_RANGE[0]:
        return None
    step = [0, 0]
    step[axis] = int(np.sign(velocity[axis]))
    return next(name for name, value in DIRECTIONS.items() if value == tuple(step))


def _shape_of(covered: np.ndarray) -> str | None:
    """Shape whose template fits the sprite, averaged over time about its centre, best."""
    seen = covered[_seen(covered)]
    if not len(seen):
        return None
    portrait = _centred(seen).mean(axis=0)
    names, templates = _templates(portrait.shape[-1])
    misfit = ((templates - portrait) ** 2).sum(axis=(1, 2)) / (
        (templates**2).sum(axis=(1, 2)) + (portrait**2).sum()
    )
    return names[int(misfit.argmin())]


def _centred(covered: np.ndarray) -> np.ndarray:
    """Coverage `[n, H, H]` moved, by fractions of pixels, so that its mean is in the middle."""
    size = covered.shape[-1]
    shift = 0.5 - _centres(covered)
    frequency = np.fft.fftfreq(size) * size
    turn = np.exp(-2j * np.pi * frequency * shift[..., None])  # [n, 2, size]
    spectrum = np.fft.fft2(covered) * turn[:, 0, None, :] * turn[:, 1, :, None]
    return np.fft.ifft2(spectrum).real.astype(np.float32)


@functools.lru_cache(maxsize=8)
def _templates(size: int) -> tuple[list[str], np.ndarray]:
    """Names and portraits `[t, size, size]` of every shape at many radii and some blurs."""
    names: list[str] = []
    portraits = []
    frequency = np.fft.fftfreq(size) * size
    for blur in TEMPLATE_BLURS:
        passed = np.exp(-2 * (np.pi * blur * frequency) ** 2)
        for shape in SHAPES:
            for radius in TEMPLATE_RADII:
                sprite = coverage(shape, np.full((1, 2), 0.5), float(radius), size)
                spectrum = np.fft.fft2(sprite) * passed[:, None] * passed
                share = np.fft.ifft2(spectrum).real
                portraits.append(_centred(np.clip(2.0 * share - 0.5, 0.0, 1.0))[0])
                names.append(shape)
    return names, np.stack(portraits)
