"""Score a model on the sprite world: generate on Ray, judge with the exact scorer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.sprite_score import SpriteScore, score
from evaluation.sprites import SpritePrompt
from jobs.console import OnProgress
from streamdit.config import SamplingConfig

if TYPE_CHECKING:
    from streamdit.loading import StreamingModel


@dataclass(frozen=True)
class ScoredVideo:
    """A generated video, uint8 `[n, H, W, 3]`, and what it got right."""

    prompt: SpritePrompt
    frames: np.ndarray
    score: SpriteScore


def score_videos(videos: np.ndarray, prompts: Sequence[SpritePrompt]) -> list[ScoredVideo]:
    """Judge each video `[i, n, H, W, 3]` against prompt i."""
    return [
        ScoredVideo(prompt, video, score(video, prompt))
        for video, prompt in zip(videos, prompts, strict=True)
    ]


def generate_batch(
    model: str,
    sampling: SamplingConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int,
) -> np.ndarray:
    """Stream one video per prompt, all in step.

    Args:
        model: what :func:`streamdit.load` takes.
        sampling: scheme and guidance.
        prompts: one per video.
        seeds: one per video.
        frames: video frames.

    Returns:
        uint8 `[b, frames, H, W, 3]`.
    """
    import streamdit

    return stream_batch(streamdit.load(model), sampling, prompts, seeds, frames)


def stream_batch(
    model: StreamingModel,
    sampling: SamplingConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int,
    plain: bool = False,
) -> np.ndarray:
    """:func:`generate_batch` with a model that is loaded.

    `plain` evaluates the network as it is at every step, so that hooks on it see every evaluation.
    """
    import torch

    from streamdit.decoding import to_uint8
    from streamdit.loading import DEFAULT_FAST

    fast = None if plain else DEFAULT_FAST
    denoiser = model.denoiser(list(prompts), seeds, sampling, fast=fast)
    decoder_state, decoded = None, []
    with torch.no_grad():
        while sum(part.shape[1] for part in decoded) < frames:
            latents = denoiser.step()
            if latents is not None:
                raw = model.autoencoder.denormalise(latents)
                part, decoder_state = model.autoencoder.decode(raw, decoder_state)
                decoded.append(part)
        return to_uint8(torch.cat(decoded, dim=1)[:, :frames])


def generate_videos(
    model: str,
    sampling: SamplingConfig,
    prompts: Sequence[str],
    seed: int,
    frames: int,
    batch: int = 16,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Videos of `prompts`, uint8 `[i, frames, H, W, 3]`, from parallel Ray tasks.

    Each has one CPU, and a GPU where there are any. Video i is streamed with seed `seed + i`,
    whatever the batch size.
    """
    import ray

    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(generate_batch)
    pending = {}
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        seeds = [seed + start + index for index in range(len(part))]
        pending[remote.remote(model, sampling, part, seeds, frames)] = start
    videos: dict[int, np.ndarray] = {}
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        start = pending.pop(ready[0])
        videos |= {start + offset: video for offset, video in enumerate(ray.get(ready[0]))}
        if on_progress is not None:
            on_progress(len(videos), len(prompts), {})
    return np.stack([videos[index] for index in range(len(prompts))])


def cached_videos(path: Path, key: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """Videos kept at `path` if they were made for the same `key`, else made and kept."""
    text = json.dumps(key, sort_keys=True)
    if path.is_file():
        with np.load(path) as stored:
            if str(stored["key"]) == text:
                videos: np.ndarray = stored["videos"]
                return videos
    videos = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".partial.npz")
    np.savez_compressed(staging, key=np.array(text), videos=videos)
    staging.replace(path)
    return videos
