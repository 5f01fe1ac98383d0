"""What `streamdit bench step` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from jobs.bench_peer import OUR_BLOCK, PAIR, PEER_BLOCK, paired_blocks
from jobs.bench_rows import (
    CEILING,
    FLOAT8_CEILING,
    Effort,
    Failures,
    Measured,
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
from jobs.bench_subject import full_attention, prompt_of
from jobs.bench_variants import FLOAT8, PLAIN, capability_of, networks_of, step_variants
from jobs.console import progress
from jobs.measure import (
    MemoryMeter,
    float8_matmul_action,
    interleave,
    matmul_action,
    wait_for,
)
from streamdit.denoiser import Denoiser
from streamdit.loading import StreamingModel
from streamdit.model.fast import FastConfig
from streamdit.model.flops import count_flops

FULL_ATTENTION = "plain, full attention"
"""The plain step of the same weights without windows."""


def measure_steps(subject: StreamingModel, effort: Effort, save: Save = keep_nothing) -> Measured:
    """Time :meth:`Denoiser.step` of a running stream, variant by variant.

    Differences are those of the first step's change to the buffer, which is the velocity times a
    constant. Beside the steps, one block of ours and of diffusers' are timed at equal dimensions,
    and bare matrix products for about as long as a step's take.
    """
    device, sampling = subject.device, subject.config.sampling
    dtype = subject.model.patch_embedding.weight.dtype
    variants = step_variants(effort.compiled, capability_of(device), dtype, effort.autotune)
    runs: dict[str, tuple[StreamingModel, FastConfig | None]] = {
        name: (subject, fast) for name, fast in variants.items()
    }
    if (whole := full_attention(subject)) is not None:
        runs[FULL_ATTENTION] = whole, None
    failures = Failures()
    denoisers, changes, peaks = _running_denoisers(runs, failures)
    runs = {name: run for name, run in runs.items() if name in denoisers}
    variants = {name: fast for name, fast in variants.items() if name in denoisers}
    evaluations = 1 if sampling.guidance_scale == 1.0 else 2
    shapes = layer_shapes(subject.config.model, evaluations)
    depth = subject.config.model.depth
    products = {CEILING: matmul_action(shapes, device, dtype, repeats=depth)}
    if FLOAT8 in variants:
        products[FLOAT8_CEILING] = float8_matmul_action(shapes, device, repeats=depth)
    actions: dict[str, Callable[[], object]] = {
        **{name: denoiser.step for name, denoiser in denoisers.items()},
        **{name: action for name, (action, _) in products.items()},
    }
    with failures.allowed(PEER_BLOCK):
        actions |= paired_blocks(subject.config.model, device, dtype)
    for action, _ in products.values():
        action()  # warm, as the variants are
    with progress("step", unit="rounds") as on_progress:
        timings = interleave(
            actions, device, on_progress=on_progress, on_error=failures.note, **effort.bounds
        )
    runs = {name: run for name, run in runs.items() if name in timings}
    variants = {name: fast for name, fast in variants.items() if name in timings}
    ceilings = {name: count / timings[name].percentile(50) for name, (_, count) in products.items()}
    frames = subject.autoencoder.frames_for(subject.scheme().c, first=False) / subject.scheme().s
    bfloat16 = fastest_of(timings, [name for name in variants if name != FLOAT8])
    rows = []
    for name, (run, fast) in runs.items():
        flops = count_flops(run.config.model, text_tokens=tokens_per_encoder(run))
        rate = evaluations * executed_flops(flops, fast) / timings[name].percentile(50)
        difference = None if run is whole else relative_error(changes[name], changes[PLAIN])
        verdict = None
        if name == FLOAT8:
            assert difference is not None
            verdict = float8_verdict(timings[name], timings[bfloat16], difference)
        rows.append(
            make_row(
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
    rows += [make_row(name, timings, None) for name in PAIR if name in timings]
    rows += failures.rows()
    rows += [
        make_row(name, timings, None, flops_per_second=1e3 * rate)
        for name, rate in ceilings.items()
    ]
    ratios = ratios_of(timings, list(variants))
    if FULL_ATTENTION in runs:
        ratios["windows ÷ full attention"] = timings[PLAIN].ratio_to(timings[FULL_ATTENTION])
    if set(PAIR) <= set(timings):
        ratios["our block ÷ diffusers'"] = timings[OUR_BLOCK].ratio_to(timings[PEER_BLOCK])
    save(Measured(rows, ratios, bfloat16))

    def step(denoiser: Denoiser) -> Callable[[], object]:
        return lambda: (denoiser.step(), wait_for(device))

    alone = {name: step(denoisers[name]) for name in variants}
    rows += sustained_rows(alone, timings, frames, device, effort.sustained)
    return Measured(rows, ratios, bfloat16)


def _running_denoisers(
    runs: Mapping[str, tuple[StreamingModel, FastConfig | None]], failures: Failures
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
            with failures.allowed(name):
                with MemoryMeter(subject.device, networks_of(subject.model, fast)) as meter:
                    denoiser = subject.denoiser([prompt], [0], fast=fast)
                    changes[name] = step_change(denoiser)
                    if running is None:
                        while denoiser.filling:
                            denoiser.step()
                        running = denoiser.state()
                    else:
                        denoiser.restore(running)
                    meter.warm()
                    denoiser.step()
                denoisers[name], peaks[name] = denoiser, meter.peak_bytes
            on_progress(len(denoisers) + len(failures), len(runs), {})
    return denoisers, changes, peaks
