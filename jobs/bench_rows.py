"""What `streamdit bench` measures: variants of a step, of the decoder and of whole streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jobs.bench_subject import prompt_of
from jobs.console import progress
from jobs.measure import MemoryMeter, Timings, interleave, matmul_action
from streamdit.decoding import ChunkDecoder, DecoderConfig
from streamdit.denoiser import Denoiser
from streamdit.io import StreamingModel
from streamdit.model.fast import FLOAT8_CAPABILITY, FastConfig
from streamdit.model.flops import PER_PROMPT, PER_SCHEDULE, count_flops
from streamdit.stream import Stream

PLAIN = "plain"

CEILING = "matrix products alone"
"""Name of the bare matrix products that are timed beside the steps."""

BURST = 4
"""Chunks that a stream makes in one round: what it does ahead is then paid for in the round."""


@dataclass(frozen=True)
class Row:
    """A variant in the table.

    Attributes:
        variant: what was added last.
        p50_ms: median time of a step, a decoded chunk, or both.
        p95_ms: the time that 95 % stayed at or below.
        versus_plain: median over the rounds of plain time by this time.
        fps: video frames a second; None for what makes none.
        flops_per_second: operations a second; None where they are not counted.
        share_of_ceiling: of the rate of bare matrix products in the same run.
        peak_bytes: device memory that it takes beyond the weights; None on CPUs.
        difference: relative difference of its result from plain.
    """

    variant: str
    p50_ms: float
    p95_ms: float
    versus_plain: float
    fps: float | None
    flops_per_second: float | None = None
    share_of_ceiling: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None


def step_variants(device: torch.device, compiled: bool) -> dict[str, FastConfig | None]:
    """Optimisations of a step, each on top of those before, as far as the device has them."""
    variants: dict[str, FastConfig | None] = {
        PLAIN: None,
        "+ modulation table": FastConfig(text_memory=False),
        "+ text memory": FastConfig(),
    }
    if compiled:
        variants["+ compiled blocks"] = FastConfig(compile=True)
    if device.type == "cuda":
        graph = FastConfig(compile=compiled, cuda_graph=True)
        variants["+ CUDA graph"] = graph
        cudnn = graph.model_copy(update={"attention": "cudnn"})
        variants["+ cuDNN attention"] = cudnn
        if torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY:
            variants["+ float8"] = cudnn.model_copy(update={"float8": True})
    return variants


def decoder_variants(device: torch.device, compiled: bool) -> dict[str, DecoderConfig]:
    """Optimisations of the decoder, each on top of those before."""
    bf16 = DecoderConfig(bfloat16=True, channels_last=True)
    variants = {
        PLAIN: DecoderConfig(),
        "+ channels last": DecoderConfig(channels_last=True),
        "+ bfloat16": bf16,
    }
    if compiled:
        variants["+ compiled"] = bf16.model_copy(update={"compile": True})
    return variants


def measure_steps(subject: StreamingModel, rounds: int, compiled: bool | None) -> list[Row]:
    """Time :meth:`Denoiser.step` of a running stream, variant by variant.

    Differences are those of the first step's change to the buffer, which is the velocity times a
    constant.
    """
    device, sampling = subject.device, subject.config.sampling
    prompt = prompt_of(max(encoder.max_tokens for encoder in subject.config.text_encoders))
    scheme = subject.scheme()
    denoisers: dict[str, Denoiser] = {}
    peaks: dict[str, int | None] = {}
    changes: dict[str, torch.Tensor] = {}
    variants = step_variants(device, _compiled(compiled, device))
    with progress("prepare", unit="variants") as on_progress:
        for name, fast in variants.items():
            with MemoryMeter(device) as meter:
                denoiser = subject.denoiser([prompt], [0], fast=fast)
                before = denoiser.buffer
                denoiser.step()
                changes[name] = (denoiser.buffer - before).cpu()
                while denoiser.filling:
                    denoiser.step()
            denoisers[name], peaks[name] = denoiser, meter.peak_bytes
            on_progress(len(denoisers), len(variants), {})
    evaluations = 1 if sampling.guidance_scale == 1.0 else 2
    dtype = subject.model.patch_embedding.weight.dtype
    products, product_flops = matmul_action(_layer_shapes(subject, evaluations), device, dtype)
    actions = {name: denoiser.step for name, denoiser in denoisers.items()}
    with progress("step", unit="rounds") as on_progress:
        timings = interleave({**actions, CEILING: products}, device, rounds, on_progress)
    ceiling = product_flops / timings[CEILING].percentile(50)
    flops = count_flops(subject.config.model, text_tokens=_tokens_per_encoder(subject))
    frames = subject.autoencoder.frames_for(scheme.c, first=False) / scheme.s
    rows = []
    for name, fast in variants.items():
        work = evaluations * _executed(flops, fast)
        rate = work / timings[name].percentile(50)
        rows.append(
            _row(
                name,
                timings,
                frames,
                flops_per_second=1e3 * rate,
                share_of_ceiling=rate / ceiling,
                peak_bytes=peaks[name],
                difference=_relative(changes[name], changes[PLAIN]),
            )
        )
    rows.append(_row(CEILING, timings, None, flops_per_second=1e3 * ceiling))
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


def _layer_shapes(subject: StreamingModel, evaluations: int) -> list[tuple[int, int, int]]:
    """`(m, k, n)` of the matrix products of one block that see every video token."""
    config = subject.config.model
    tokens = evaluations * math.prod(config.token_grid(config.buckets[0]))
    width = config.width
    return [
        (tokens, width, 3 * width),
        *[(tokens, width, width)] * 3,
        (tokens, width, config.ffn_width),
        (tokens, config.ffn_width, width),
    ]


def measure_decoding(subject: StreamingModel, rounds: int, compiled: bool | None) -> list[Row]:
    """Time the decoding of one chunk after another, up to pictures on the host.

    Differences are of the pictures, relative to the deviation of plain's.
    """
    device, config = subject.device, subject.config.model
    scheme, bucket = subject.scheme(), config.buckets[0]
    generator = torch.Generator().manual_seed(0)
    shape = (1, scheme.c, config.latent_channels, bucket.height, bucket.width)
    latents = torch.randn(shape, generator=generator).to(device)
    decoders: dict[str, ChunkDecoder] = {}
    peaks: dict[str, int | None] = {}
    pictures: dict[str, torch.Tensor] = {}
    variants = decoder_variants(device, _compiled(compiled, device))
    with progress("prepare", unit="variants") as on_progress:
        for name, options in variants.items():
            with MemoryMeter(device) as meter:
                decoder = ChunkDecoder(subject.autoencoder, device, options)
                decoder.submit(latents).wait()
                pixels = torch.from_numpy(decoder.submit(latents).wait())
            decoders[name], peaks[name] = decoder, meter.peak_bytes
            pictures[name] = pixels.float() - 127.5
            on_progress(len(decoders), len(variants), {})

    def action(decoder: ChunkDecoder) -> Callable[[], object]:
        return lambda: decoder.submit(latents).wait()

    actions = {name: action(decoder) for name, decoder in decoders.items()}
    with progress("decode", unit="rounds") as on_progress:
        timings = interleave(actions, device, rounds, on_progress)
    frames = subject.autoencoder.frames_for(scheme.c, first=False)
    return [
        _row(
            name,
            timings,
            frames,
            peak_bytes=peaks[name],
            difference=_relative(pictures[name], pictures[PLAIN]),
        )
        for name in variants
    ]


def measure_streams(subject: StreamingModel, rounds: int, compiled: bool | None) -> list[Row]:
    """Time chunks of whole streams, from the first step's launch to pictures on the host."""
    device = subject.device
    with_compile = _compiled(compiled, device)
    steps = step_variants(device, with_compile)
    decoders = decoder_variants(device, with_compile)
    exact = [fast for fast in steps.values() if fast is not None and not fast.float8]
    fast_decoder = list(decoders.values())[-1]
    ahead = fast_decoder.model_copy(update={"overlap": True})
    variants: dict[str, tuple[FastConfig | None, DecoderConfig]] = {
        PLAIN: (None, DecoderConfig()),
        "+ fast step": (exact[-1], DecoderConfig()),
        "+ fast decoder": (exact[-1], fast_decoder),
        "+ decoding ahead": (exact[-1], ahead),
    }
    if "+ float8" in steps:
        variants["+ float8"] = (steps["+ float8"], ahead)
    prompt = prompt_of(max(encoder.max_tokens for encoder in subject.config.text_encoders))
    actions: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int | None] = {}
    with progress("prepare", unit="variants") as on_progress:
        for name, (fast, decoder) in variants.items():
            with MemoryMeter(device) as meter:
                running = subject.stream(prompt, fast=fast, decoder=decoder)
                next(running)
                next(running)
            actions[name], peaks[name] = _burst(running), meter.peak_bytes
            on_progress(len(actions), len(variants), {})
    with progress("stream", unit="rounds") as on_progress:
        timings = interleave(actions, device, rounds, on_progress, parts=BURST)
    frames = subject.autoencoder.frames_for(subject.scheme().c, first=False)
    return [_row(name, timings, frames, peak_bytes=peaks[name]) for name in variants]


def _burst(running: Stream) -> Callable[[], object]:
    return lambda: [next(running) for _ in range(BURST)]


def _row(name: str, timings: dict[str, Timings], frames: float | None, **figures: Any) -> Row:
    mine = timings[name]
    p50 = mine.percentile(50)
    return Row(
        variant=name,
        p50_ms=p50,
        p95_ms=mine.percentile(95),
        versus_plain=timings[PLAIN].ratio_to(mine),
        fps=None if frames is None else 1e3 * frames / p50,
        **figures,
    )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _compiled(wanted: bool | None, device: torch.device) -> bool:
    return device.type == "cuda" if wanted is None else wanted
