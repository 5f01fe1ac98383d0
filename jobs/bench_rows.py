"""What the measurements of `streamdit bench` have in common: rows, and how they come about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from jobs.bench_variants import (
    FLOAT8,
    PLAIN,
)
from jobs.measure import (
    Timings,
    sustain,
)
from streamdit.config import DiTConfig
from streamdit.denoiser import Denoiser
from streamdit.errors import UserError
from streamdit.loading import StreamingModel
from streamdit.model.fast import FastConfig
from streamdit.model.flops import PER_PROMPT, PER_SCHEDULE
from streamdit.model.quantise import ERROR_BOUND

CEILING = "matrix products alone"
"""Name of the bare matrix products that are timed beside the steps."""

FLOAT8_CEILING = "e4m3 products alone"
"""The same in e4m3, which only the float8 variant is measured against."""

MOST_REASON = 160
"""Characters of why a variant failed."""

ROUNDS = 30
SECONDS = 90.0
"""How much is timed where nothing is asked for: this many rounds, or what fits in this time."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: timed rounds; None: :data:`ROUNDS`, or as many as fit in the seconds.
        sustained: seconds for which the fastest variant runs alone at the end.
        compiled: whether compiled steps are measured.
        compiled_decoder: whether a compiled decoder is.
        autotune: whether compiled steps are also tuned.
        seconds: after this time no further round begins; None: :data:`SECONDS`, or no limit where
            the rounds are given.
    """

    rounds: int | None = None
    sustained: float = 0.0
    compiled: bool = False
    seconds: float | None = None
    compiled_decoder: bool = False
    autotune: bool = False

    @property
    def bounds(self) -> dict[str, Any]:
        """As arguments of :func:`jobs.measure.interleave`. Every variant is warm by then."""
        seconds = SECONDS if self.rounds is None else math.inf
        return {
            "rounds": self.rounds or ROUNDS,
            "warm_up": 0,
            "seconds": self.seconds if self.seconds is not None else seconds,
        }


@dataclass(frozen=True)
class Row:
    """A variant in the table.

    Attributes:
        variant: what was added last.
        p50_ms: median time of a step, a decoded chunk, or both; None for what did not run.
        p95_ms: the time that 95 % stayed at or below.
        versus_plain: median over the rounds of plain time by this time; None for what ran alone,
            and for what makes no frames.
        fps: video frames a second; None for what makes none.
        flops_per_second: operations a second; None where they are not counted.
        share_of_ceiling: of the rate of bare matrix products of the same kind in the same run.
        peak_bytes: device memory that it takes once warm, weights included (not those of text
            encoders); None on CPUs.
        difference: relative difference of its result from plain.
        verdict: whether a variant that rounds more is worth it, or why one did not run.
        clips_per_second: that training goes through.
        model_flops_utilisation: operations a second by the peak that the device's maker states.
    """

    variant: str
    p50_ms: float | None
    p95_ms: float | None
    versus_plain: float | None
    fps: float | None
    flops_per_second: float | None = None
    share_of_ceiling: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    verdict: str | None = None
    clips_per_second: float | None = None
    model_flops_utilisation: float | None = None


@dataclass(frozen=True)
class Measured:
    """A table, and ratios of times that stand for it: medians over the rounds.

    Attributes:
        rows: the table.
        ratios: by what they are of.
        fastest: the exact variant that took least, by name.
    """

    rows: list[Row]
    ratios: dict[str, float] = field(default_factory=dict)
    fastest: str = PLAIN


Save = Callable[[Measured], None]
"""Takes what is measured so far: what comes next may fail, or be cut off."""


def keep_nothing(measured: Measured) -> None:
    """Where nobody wants figures before the end."""


class Failures(dict[str, str]):
    """Variants at which a library or the device failed, and why: the others are measured."""

    @contextmanager
    def allowed(self, name: str) -> Iterator[None]:
        """Note what goes wrong with a variant; plain, and what the user asked for, must work."""
        try:
            yield
        except Exception as error:
            self.note(name, error)

    def note(self, name: str, error: Exception) -> None:
        """The same for an error that is there already."""
        if isinstance(error, UserError) or name in (PLAIN, CEILING, FLOAT8_CEILING):
            raise error
        text = (str(error).strip() or "no message").splitlines()[0]
        self[name] = f"{type(error).__name__}: {text}"[:MOST_REASON]

    def rows(self) -> list[Row]:
        """A row without times for each of them."""
        return [
            Row(name, None, None, None, None, verdict=f"failed: {why}")
            for name, why in self.items()
        ]


def fastest_of(timings: Mapping[str, Timings], names: list[str]) -> str:
    """The variant among `names` with the lowest median."""
    return min(names, key=lambda name: timings[name].percentile(50))


def ratios_of(timings: Mapping[str, Timings], names: list[str]) -> dict[str, float]:
    """What the fastest exact variant takes by what plain takes."""
    best = fastest_of(timings, [name for name in names if name != FLOAT8])
    return {"optimised ÷ plain": timings[best].ratio_to(timings[PLAIN])}


def sustained_rows(
    actions: Mapping[str, Callable[[], object]],
    timings: Mapping[str, Timings],
    frames: float,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """The fastest exact variant, and float8, alone for a while: clocks settle and queues fill."""
    if seconds <= 0:
        return []
    best = fastest_of(timings, [name for name in actions if name != FLOAT8])
    rows, failures = [], Failures()
    for name in (best, *(name for name in actions if name == FLOAT8)):
        title = f"{name}, alone {seconds:g} s"
        with failures.allowed(title):
            alone = sustain(actions[name], device, seconds)
        if title in failures:
            continue
        rows.append(
            Row(
                variant=title,
                p50_ms=alone.percentile(50),
                p95_ms=alone.percentile(95),
                versus_plain=None,
                fps=1e3 * frames / alone.mean,
            )
        )
    return rows + failures.rows()


def executed_flops(flops: dict[str, int], fast: FastConfig | None) -> int:
    """Operations that an evaluation really takes, without what is prepared."""
    prepared: tuple[str, ...] = ()
    if fast is not None:
        prepared += PER_SCHEDULE if fast.modulation_table else ()
        prepared += PER_PROMPT if fast.text_memory else ()
    return flops["total"] - sum(flops[part] for part in prepared)


def tokens_per_encoder(subject: StreamingModel) -> dict[str, int]:
    """Most tokens of a prompt, by text encoder."""
    return {encoder.name: encoder.max_tokens for encoder in subject.config.text_encoders}


def layer_shapes(config: DiTConfig, samples: int) -> list[tuple[int, int, int]]:
    """`(m, k, n)` of the matrix products of one block that see every token of so many samples."""
    tokens = samples * math.prod(config.token_grid(config.buckets[0]))
    width = config.width
    return [
        (tokens, width, 3 * width),
        *[(tokens, width, width)] * 3,
        (tokens, width, config.ffn_width),
        (tokens, config.ffn_width, width),
    ]


def make_row(name: str, timings: dict[str, Timings], frames: float | None, **figures: Any) -> Row:
    """Row of a variant that makes `frames` video frames a time, or none; the rest as given."""
    mine = timings[name]
    p50 = mine.percentile(50)
    return Row(
        variant=name,
        p50_ms=p50,
        p95_ms=mine.percentile(95),
        versus_plain=None if frames is None else timings[PLAIN].ratio_to(mine),
        fps=None if frames is None else 1e3 * frames / p50,
        **figures,
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def step_change(denoiser: Denoiser) -> torch.Tensor:
    """What the next step adds to the buffer, on the host: the velocity, frame by frame scaled.

    The stream must still be filling its buffer, where no frame moves up.
    """
    before = denoiser.buffer
    denoiser.step()
    return (denoiser.buffer - before).cpu()


def float8_verdict(mine: Timings, exact: Timings, difference: float) -> str:
    """Whether float8 is kept: faster than the fastest exact variant, and its velocity in bounds."""
    if difference > ERROR_BOUND:
        return f"dropped: differs by more than {ERROR_BOUND:.0%}"
    if mine.percentile(50) >= exact.percentile(50):
        return "dropped: not faster"
    return "kept"
