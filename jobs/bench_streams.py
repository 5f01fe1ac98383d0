"""What `streamdit bench decode` and `stream` measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from jobs.bench_rows import (
    CEILING,
    Effort,
    Failures,
    Measured,
    Row,
    Save,
    executed_flops,
    fastest_of,
    float8_verdict,
    keep_nothing,
    layer_shapes,
    make_row,
    ratios_of,
    relative_error,
    step_change,
    sustained_rows,
    tokens_per_encoder,
)
from jobs.bench_subject import DecodingSubject, prompt_of
from jobs.bench_variants import (
    FLOAT8,
    PLAIN,
    capability_of,
    decoder_variants,
    decoders_of,
    networks_of,
    step_variants,
)
from jobs.console import progress
from jobs.measure import MemoryMeter, interleave, matmul_action
from streamdit.decoding import ChunkDecoder, DecoderConfig
from streamdit.loading import StreamingModel
from streamdit.model.fast import FastConfig
from streamdit.model.flops import count_flops
from streamdit.stream import Stream

NO_DECODING = "fast step, no decoding"
"""Name of the row of a stream that is denoised only."""

BURST = 4
"""Chunks that a stream makes in one round: what it does ahead is then paid for in the round."""


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
    variants = decoder_variants(effort.compiled_decoder, capability_of(device))
    failures = Failures()
    with progress("prepare", unit="variants") as on_progress:
        for name, options in variants.items():
            with failures.allowed(name):
                with MemoryMeter(device, decoders_of(subject.autoencoder, options)) as meter:
                    decoder = ChunkDecoder(subject.autoencoder, device, options)
                    decoder.submit(latents).wait()
                    pixels = decoder.submit(latents).wait()
                    meter.warm()
                    decoder.submit(latents).wait()
                decoders[name], peaks[name] = decoder, meter.peak_bytes
                pictures[name] = centred(pixels)
            on_progress(len(decoders) + len(failures), len(variants), {})

    def action(decoder: ChunkDecoder) -> Callable[[], object]:
        return lambda: decoder.submit(latents).wait()

    actions = {name: action(decoder) for name, decoder in decoders.items()}
    with progress("decode", unit="rounds") as on_progress:
        timings = interleave(
            actions, device, on_progress=on_progress, on_error=failures.note, **effort.bounds
        )
    decoders = {name: decoder for name, decoder in decoders.items() if name in timings}
    frames = subject.autoencoder.frames_for(subject.chunk_frames, first=False)
    rows = [
        make_row(
            name,
            timings,
            frames,
            peak_bytes=peaks[name],
            difference=relative_error(pictures[name], pictures[PLAIN]),
        )
        for name in decoders
    ]
    return Measured(
        rows + failures.rows(),
        ratios_of(timings, list(decoders)),
        fastest_of(timings, list(decoders)),
    )


def measure_streams(
    subject: StreamingModel,
    effort: Effort,
    fastest_step: str | None = None,
    save: Save = keep_nothing,
) -> Measured:
    """Time chunks of whole streams, from the first step's launch to pictures on the host.

    Rates are of the operations of denoising. One row denoises without decoding. Differences are of
    the third chunk's pictures, as :func:`measure_decoding` takes them; whether float8 is kept is
    judged by the velocity, as :func:`jobs.bench_steps.measure_steps` does.

    Args:
        subject: what streams.
        effort: how long to measure.
        fastest_step: exact variant of the step to stream with; default: the last one.
        save: given the table before what runs alone is measured.
    """
    device = subject.device
    dtype = subject.model.patch_embedding.weight.dtype
    steps = step_variants(effort.compiled, capability_of(device), dtype, effort.autotune)
    decoders = decoder_variants(effort.compiled_decoder, capability_of(device))
    exact = fastest_step or [name for name in steps if name != FLOAT8][-1]
    fast_step = steps[exact]
    fast_decoder = list(decoders.values())[-1]
    ahead = fast_decoder.model_copy(update={"overlap": True})
    variants: dict[str, tuple[FastConfig | None, DecoderConfig]] = {
        PLAIN: (None, DecoderConfig()),
        "+ fast step": (fast_step, DecoderConfig()),
        "+ fast decoder": (fast_step, fast_decoder),
        "+ decoding ahead": (fast_step, ahead),
    }
    if FLOAT8 in steps:
        variants[FLOAT8] = (steps[FLOAT8], ahead)
    prompt = prompt_of(max(encoder.max_tokens for encoder in subject.config.text_encoders))
    streams: dict[str, Stream] = {}
    peaks: dict[str, int | None] = {}
    pictures: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    failures = Failures()
    with progress("prepare", unit="variants") as on_progress:
        for name, (fast, decoder) in variants.items():
            with failures.allowed(name):
                weights = networks_of(subject.model, fast)
                weights += decoders_of(subject.autoencoder, decoder)
                with MemoryMeter(device, weights) as meter:
                    running = subject.stream(prompt, fast=fast, decoder=decoder)
                    beginning = running.denoiser.state()
                    changes[name] = step_change(running.denoiser)
                    running.denoiser.restore(beginning)
                    next(running)
                    next(running)
                    meter.warm()
                    chunk = next(running)
                streams[name], peaks[name] = running, meter.peak_bytes
                pictures[name] = centred(chunk.frames)
            on_progress(len(streams) + len(failures), len(variants), {})
    evaluations = 1 if subject.config.sampling.guidance_scale == 1.0 else 2
    blocks = subject.config.model.depth * subject.scheme().s
    product, product_flops = matmul_action(
        layer_shapes(subject.config.model, evaluations), device, dtype, repeats=blocks
    )
    actions = {name: _burst(running.__next__) for name, running in streams.items()}
    if "+ fast step" in streams:
        with failures.allowed(NO_DECODING):
            actions[NO_DECODING] = _burst(_chunks_alone(subject, prompt, fast_step))
    actions[CEILING] = _burst(product)
    actions[CEILING]()  # warm, as the streams are
    with progress("stream", unit="rounds") as on_progress:
        timings = interleave(
            actions,
            device,
            on_progress=on_progress,
            parts=BURST,
            on_error=failures.note,
            **effort.bounds,
        )
    streams = {name: running for name, running in streams.items() if name in timings}
    frames = subject.autoencoder.frames_for(subject.scheme().c, first=False)
    ceiling = product_flops / timings[CEILING].percentile(50)
    flops = count_flops(subject.config.model, text_tokens=tokens_per_encoder(subject))

    def row(name: str, fast: FastConfig | None, peak_bytes: int | None) -> Row:
        operations = subject.scheme().s * evaluations * executed_flops(flops, fast)
        rate = operations / timings[name].percentile(50)
        return make_row(
            name,
            timings,
            frames,
            flops_per_second=1e3 * rate,
            share_of_ceiling=None if name == FLOAT8 else rate / ceiling,
            peak_bytes=peak_bytes,
        )

    rows = [
        replace(
            row(name, variants[name][0], peaks[name]),
            difference=relative_error(pictures[name], pictures[PLAIN]),
        )
        for name in streams
    ]
    exact_stream = fastest_of(timings, [name for name in streams if name != FLOAT8])
    if FLOAT8 in streams:
        error = relative_error(changes[FLOAT8], changes[PLAIN])
        verdict = float8_verdict(timings[FLOAT8], timings[exact_stream], error)
        rows[-1] = replace(rows[-1], verdict=verdict)
    rows += failures.rows()
    if NO_DECODING in timings:
        rows.append(row(NO_DECODING, fast_step, None))
    rows.append(make_row(CEILING, timings, None, flops_per_second=1e3 * ceiling))
    ratios = ratios_of(timings, list(streams))
    save(Measured(rows, ratios, exact_stream))
    # No waiting between chunks, as where they are shown one after the other.
    alone = {name: running.__next__ for name, running in streams.items()}
    rows += sustained_rows(alone, timings, frames, device, effort.sustained)
    return Measured(rows, ratios, exact_stream)


def centred(pixels: np.ndarray) -> torch.Tensor:
    """Pictures, uint8, as deviations from mid-grey."""
    return torch.from_numpy(pixels).float() - 127.5


def _chunks_alone(
    subject: StreamingModel, prompt: str, fast: FastConfig | None
) -> Callable[[], object]:
    """Denoises a running stream by one chunk a call; nothing is decoded."""
    denoiser = subject.denoiser([prompt], [0], fast=fast)
    while denoiser.filling:
        denoiser.step()
    return lambda: [denoiser.step() for _ in range(subject.scheme().s)]


def _burst(action: Callable[[], object]) -> Callable[[], object]:
    return lambda: [action() for _ in range(BURST)]
