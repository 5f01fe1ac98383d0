"""The systems that the sprite benchmark compares, and what a stream of each costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.sprites import SpritePrompt
from jobs.evaluate import stream_batch
from streamdit.config import SamplingConfig, StreamDiTConfig
from streamdit.errors import UserError
from streamdit.io import read_model_config
from streamdit.loading import StreamingModel

TIMED_FRAMES = 64


@dataclass(frozen=True)
class System:
    """A model and how it is sampled."""

    label: str
    model: str
    sampling: SamplingConfig


def plan_systems(teacher: Path, student: Path) -> list[System]:
    """Full teacher, undistilled teacher at the student's steps, student; on the same buffer.

    Raises:
        UserError: if the student is not distilled, or from another teacher.
    """
    config, parent = read_model_config(student), read_model_config(teacher)
    record = config.distilled
    if record is None or record.teacher_sha256 != parent.weights_sha256:
        raise UserError(
            f"{student} was not distilled from {teacher}; give a student and its own teacher"
        )
    few = config.sampling
    full = few.model_copy(
        update={
            "micro_steps": record.teacher_micro_steps,
            "guidance_scale": record.teacher_guidance_scale,
        }
    )
    steps = _steps(config, few)
    weight = f"guidance {full.guidance_scale:g}"
    if record.teacher_guidance_by_segment:
        weight += " (mean of its weights by segment)"
    return [
        System(f"teacher, {_steps(config, full)} steps, {weight}", str(teacher), full),
        System(f"teacher, {steps} steps, no guidance", str(teacher), few),
        System(f"student, {steps} steps", str(student), few),
    ]


def _steps(config: StreamDiTConfig, sampling: SamplingConfig) -> int:
    """Denoising steps of a frame, T."""
    chunks = (config.model.buffer_frames - sampling.reference_frames) // sampling.chunk_frames
    return chunks * sampling.micro_steps


def stream_costs(
    systems: Sequence[System], prompt: SpritePrompt, rounds: int, fps: float
) -> dict[str, tuple[float, list[float]]]:
    """Evaluations and wall times per second of video of one stream; the systems take turns.

    Both are of the steady state: what twice as much video costs, less what once as much does.
    """
    import streamdit

    models = {system.label: streamdit.load(system.model) for system in systems}
    timed = {
        system.label: whole_chunks(models[system.label], system, TIMED_FRAMES) for system in systems
    }
    evaluations = {}
    for system in systems:
        frames = timed[system.label]
        once, twice = (
            count_evaluations(models[system.label], system, prompt, length)
            for length in (frames, 2 * frames)
        )
        evaluations[system.label] = (twice - once) * fps / frames
    seconds: dict[str, list[float]] = {system.label: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            frames = timed[system.label]
            once, twice = (
                _time_stream(models[system.label], system, prompt, length)
                for length in (frames, 2 * frames)
            )
            seconds[system.label].append((twice - once) * fps / frames)
    return {label: (evaluations[label], seconds[label]) for label in evaluations}


def whole_chunks(model: StreamingModel, system: System, frames: int) -> int:
    """Frames of as many chunks as hold at least `frames`: a stream makes whole chunks."""
    chunk = system.sampling.chunk_frames * model.config.autoencoder.temporal_factor
    return -(-frames // chunk) * chunk


def count_evaluations(
    model: StreamingModel, system: System, prompt: SpritePrompt, frames: int
) -> int:
    """Evaluations of a stream, as a hook on the network sees them; a batch row is one."""
    rows: list[int] = []
    hook = model.model.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    try:
        stream_batch(model, system.sampling, [prompt.caption()], [0], frames, plain=True)
    finally:
        hook.remove()
    return sum(rows)


def _time_stream(model: StreamingModel, system: System, prompt: SpritePrompt, frames: int) -> float:
    """Seconds that a stream takes, decoding included."""
    started = time.perf_counter()
    stream_batch(model, system.sampling, [prompt.caption()], [0], frames)
    return time.perf_counter() - started
