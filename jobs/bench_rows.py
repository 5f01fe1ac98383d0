"""What `streamdit bench` measures: variants of a step, of the decoder and of whole streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jobs.bench_subject import DecodingSubject, full_attention, prompt_of
from jobs.bench_variants import (
    FLOAT8,
    PLAIN,
    capability_of,
    decoder_variants,
    step_variants,
)
from jobs.console import progress
from jobs.measure import (
    MemoryMeter,
    Timings,
    float8_matmul_action,
    interleave,
    matmul_action,
    sustain,
    wait_for,
)
from streamdit.config import DiTConfig
from streamdit.decoding import ChunkDecoder, DecoderConfig
from streamdit.denoiser import Denoiser
from streamdit.loading import StreamingModel
from streamdit.model.fast import FastConfig
from streamdit.model.flops import PER_PROMPT, PER_SCHEDULE, count_flops
from streamdit.model.quantise import ERROR_BOUND
from streamdit.stream import Stream

CEILING = "matrix products alone"
"""Name of the bare matrix products that are timed beside the steps."""

FLOAT8_CEILING = "e4m3 products alone"
"""The same in e4m3, which only the float8 variant is measured against."""

FULL_ATTENTION = "plain, full attention"
"""The plain step of the same weights without windows."""

BURST = 4
"""Chunks that a stream makes in one round: what it does ahead is then paid for in the round."""

ROUNDS = 30
SECONDS = 90.0
"""How much is timed where nothing is asked for: this many rounds, or what fits in this time."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: timed rounds; None: :data:`ROUNDS`, or as many as fit in :data:`SECONDS`.
        sustained: seconds for which the fastest variant runs alone at the end.
        compiled: whether compiled variants are measured.
    """

    rounds: int | None = None
    sustained: float = 0.0
    compiled: bool = False

    @property
    def bounds(self) -> dict[str, Any]:
        """As arguments of :func:`jobs.measure.interleave`. Every variant is warm by then."""
        if self.rounds is not None:
            return {"rounds": self.rounds, "warm_up": 0}
        return {"rounds": ROUNDS, "warm_up": 0, "seconds": SECONDS}


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
        peak_bytes: device memory that it takes once warm, of a stream beyond the weights, of
            training in all; None on CPUs.
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
    """A table, and ratios of times that stand for it: medians over the rounds."""

    rows: list[Row]
    ratios: dict[str, float] = field(default_factory=dict)


def measure_steps(subject: StreamingModel, effort: Effort) -> Measured:
    """Time :meth:`Denoiser.step` of a running stream, variant by variant.

    Differences are those of the first step's change to the buffer, which is the velocity times a
    constant.
    """
    device, sampling = subject.device, subject.config.sampling
    dtype = subject.model.patch_embedding.weight.dtype
    variants = step_variants(effort.compiled, capability_of(device), dtype)
    runs: dict[str, tuple[StreamingModel, FastConfig | None]] = {
        name: (subject, fast) for name, fast in variants.items()
    }
    if (whole := full_attention(subject)) is not None:
        runs[FULL_ATTENTION] = whole, None
    denoisers, changes, peaks = _running_denoisers(runs)
    evaluations = 1 if sampling.guidance_scale == 1.0 else 2
    shapes = layer_shapes(subject.config.model, evaluations)
    products = {CEILING: matmul_action(shapes, device, dtype)}
    if FLOAT8 in variants:
        products[FLOAT8_CEILING] = float8_matmul_action(shapes, device)
    actions: dict[str, Callable[[], object]] = {
        **{name: denoiser.step for name, denoiser in denoisers.items()},
        **{name: action for name, (action, _) in products.items()},
    }
    for action, _ in products.values():
        action()  # warm, as the variants are
    with progress("step", unit="rounds") as on_progress:
        timings = interleave(actions, device, on_progress=on_progress, **effort.bounds)
    ceilings = {name: count / timings[name].percentile(50) for name, (_, count) in products.items()}
    frames = subject.autoencoder.frames_for(subject.scheme().c, first=False) / subject.scheme().s
    bfloat16 = _fastest(timings, [name for name in variants if name != FLOAT8])
    rows = []
    for name, (run, fast) in runs.items():
        flops = count_flops(run.config.model, text_tokens=_tokens_per_encoder(run))
        rate = evaluations * _executed(flops, fast) / timings[name].percentile(50)
        difference = None if run is whole else _relative(changes[name], changes[PLAIN])
        verdict = None
        if name == FLOAT8:
            assert difference is not None
            verdict = float8_verdict(timings[name], timings[bfloat16], difference)
        rows.append(
            _row(
                name,
                timings,
                frames,
                flops_per_second=1e3 * rate,
                share_of_ceiling=rate / ceilings[FLOAT8_CEILING if name == FLOAT8 else CEILING],
                peak_bytes=peaks[name],
                difference=difference,
                verdict=verdict,
            )
        )
    rows += [
        _row(name, timings, None, flops_per_second=1e3 * rate) for name, rate in ceilings.items()
    ]

    def step(denoiser: Denoiser) -> Callable[[], object]:
        return lambda: (denoiser.step(), wait_for(device))

    alone = {name: step(denoisers[name]) for name in variants}
    rows += _sustained(alone, timings, frames, device, effort.sustained)
    ratios = _ratios(timings, list(variants))
    if FULL_ATTENTION in runs:
        ratios["windows ÷ full attention"] = timings[PLAIN].ratio_to(timings[FULL_ATTENTION])
    return Measured(rows, ratios)


def _running_denoisers(
    runs: Mapping[str, tuple[StreamingModel, FastConfig | None]],
) -> tuple[dict[str, Denoiser], dict[str, torch.Tensor], dict[str, int | None]]:
    """Denoisers of running streams, what their first step changed, and the memory that they take.

    All run on from the buffer that the first one filled.
    """
    denoisers: dict[str, Denoiser] = {}
    changes: dict[str, torch.Tensor] = {}
    peaks: dict[str, int | None] = {}
    running = None
    with progress("prepare", unit="variants") as on_progress:
        for name, (subject, fast) in runs.items():
            encoders = subject.config.text_encoders
            prompt = prompt_of(max(encoder.max_tokens for encoder in encoders))
            with MemoryMeter(subject.device) as meter:
                denoiser = subject.denoiser([prompt], [0], fast=fast)
                before = denoiser.buffer
                denoiser.step()
                changes[name] = (denoiser.buffer - before).cpu()
                if running is None:
                    while denoiser.filling:
                        denoiser.step()
                    running = denoiser.state()
                else:
                    denoiser.restore(running)
                meter.warm()
                denoiser.step()
            denoisers[name], peaks[name] = denoiser, meter.peak_bytes
            on_progress(len(denoisers), len(runs), {})
    return denoisers, changes, peaks


def float8_verdict(mine: Timings, exact: Timings, difference: float) -> str:
    """Whether float8 is kept: faster than the fastest exact variant, and within its bound."""
    if difference > ERROR_BOUND:
        return f"dropped: differs by more than {ERROR_BOUND:.0%}"
    if mine.percentile(50) >= exact.percentile(50):
        return "dropped: not faster"
    return "kept"


def _fastest(timings: Mapping[str, Timings], names: list[str]) -> str:
    return min(names, key=lambda name: timings[name].percentile(50))


def _ratios(timings: Mapping[str, Timings], names: list[str]) -> dict[str, float]:
    """What the fastest exact variant takes by what plain takes."""
    best = _fastest(timings, [name for name in names if name != FLOAT8])
    return {"optimised ÷ plain": timings[best].ratio_to(timings[PLAIN])}


def _sustained(
    actions: Mapping[str, Callable[[], object]],
    timings: Mapping[str, Timings],
    frames: float,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """The fastest exact variant, and float8, alone for a while: clocks settle and queues fill."""
    if seconds <= 0:
        return []
    best = _fastest(timings, [name for name in actions if name != FLOAT8])
    rows = []
    for name in (best, *(name for name in actions if name == FLOAT8)):
        alone = sustain(actions[name], device, seconds)
        rows.append(
            Row(
                variant=f"{name}, alone {seconds:g} s",
                p50_ms=alone.percentile(50),
                p95_ms=alone.percentile(95),
                versus_plain=None,
                fps=1e3 * frames / alone.mean,
            )
        )
    return rows


def _executed(flops: dict[str, int], fast: FastConfig | None) -> int:
    """Operations that an evaluation really takes, without what is prepared."""
    prepared: tuple[str, ...] = ()
    if fast is not None:
        prepared += PER_SCHEDULE if fast.modulation_table else ()
        prepared += PER_PROMPT if fast.text_memory else ()
    return flops["total"] - sum(flops[part] for part in prepared)


def _tokens_per_encoder(subject: StreamingModel) -> dict[str, int]:
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


def measure_decoding(subject: DecodingSubject, effort: Effort) -> Measured:
    """Time the decoding of one chunk after another, up to pictures on the host.

    Differences are of the pictures, relative to the deviation of plain's.
    """
    device = subject.device
    generator = torch.Generator().manual_seed(0)
    shape = (1, subject.chunk_frames, *subject.latent_shape)
    latents = torch.randn(shape, generator=generator).to(device)
    decoders: dict[str, ChunkDecoder] = {}
    peaks: dict[str, int | None] = {}
    pictures: dict[str, torch.Tensor] = {}
    variants = decoder_variants(effort.compiled, capability_of(device))
    with progress("prepare", unit="variants") as on_progress:
        for name, options in variants.items():
            with MemoryMeter(device) as meter:
                decoder = ChunkDecoder(subject.autoencoder, device, options)
                decoder.submit(latents).wait()
                pixels = torch.from_numpy(decoder.submit(latents).wait())
                meter.warm()
                decoder.submit(latents).wait()
            decoders[name], peaks[name] = decoder, meter.peak_bytes
            pictures[name] = pixels.float() - 127.5
            on_progress(len(decoders), len(variants), {})

    def action(decoder: ChunkDecoder) -> Callable[[], object]:
        return lambda: decoder.submit(latents).wait()

    actions = {name: action(decoder) for name, decoder in decoders.items()}
    with progress("decode", unit="rounds") as on_progress:
        timings = interleave(actions, device, on_progress=on_progress, **effort.bounds)
    frames = subject.autoencoder.frames_for(subject.chunk_frames, first=False)
    rows = [
        _row(
            name,
            timings,
            frames,
            peak_bytes=peaks[name],
            difference=_relative(pictures[name], pictures[PLAIN]),
        )
        for name in variants
    ]
    return Measured(rows, _ratios(timings, list(variants)))


def measure_streams(subject: StreamingModel, effort: Effort) -> Measured:
    """Time chunks of whole streams, from the first step's launch to pictures on the host."""
    device = subject.device
    dtype = subject.model.patch_embedding.weight.dtype
    steps = step_variants(effort.compiled, capability_of(device), dtype)
    decoders = decoder_variants(effort.compiled, capability_of(device))
    exact = [fast for name, fast in steps.items() if name != FLOAT8]
    fast_decoder = list(decoders.values())[-1]
    ahead = fast_decoder.model_copy(update={"overlap": True})
    variants: dict[str, tuple[FastConfig | None, DecoderConfig]] = {
        PLAIN: (None, DecoderConfig()),
        "+ fast step": (exact[-1], DecoderConfig()),
        "+ fast decoder": (exact[-1], fast_decoder),
        "+ decoding ahead": (exact[-1], ahead),
    }
    if FLOAT8 in steps:
        variants[FLOAT8] = (steps[FLOAT8], ahead)
    prompt = prompt_of(max(encoder.max_tokens for encoder in subject.config.text_encoders))
    streams: dict[str, Stream] = {}
    peaks: dict[str, int | None] = {}
    with progress("prepare", unit="variants") as on_progress:
        for name, (fast, decoder) in variants.items():
            with MemoryMeter(device) as meter:
                running = subject.stream(prompt, fast=fast, decoder=decoder)
                next(running)
                next(running)
                meter.warm()
                next(running)
            streams[name], peaks[name] = running, meter.peak_bytes
            on_progress(len(streams), len(variants), {})
    actions = {name: _burst(running) for name, running in streams.items()}
    with progress("stream", unit="rounds") as on_progress:
        timings = interleave(actions, device, on_progress=on_progress, parts=BURST, **effort.bounds)
    frames = subject.autoencoder.frames_for(subject.scheme().c, first=False)
    rows = [_row(name, timings, frames, peak_bytes=peaks[name]) for name in variants]
    # No waiting between chunks, as where they are shown one after the other.
    alone = {name: running.__next__ for name, running in streams.items()}
    rows += _sustained(alone, timings, frames, device, effort.sustained)
    return Measured(rows, _ratios(timings, list(variants)))


def _burst(running: Stream) -> Callable[[], object]:
    return lambda: [next(running) for _ in range(BURST)]


def _row(name: str, timings: dict[str, Timings], frames: float | None, **figures: Any) -> Row:
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


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
