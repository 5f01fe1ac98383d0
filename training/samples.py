"""Videos from a model under training, for people to look at: held-out captions, fixed noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from streamdit.autoencoder import Autoencoder, load_autoencoder
from streamdit.decoding import ChunkDecoder
from streamdit.denoiser import Denoiser
from streamdit.flow import VelocityFunction
from streamdit.partition import PartitionScheme
from streamdit.start import StreamStart
from streamdit.text.base import TextStates
from training.data import LatentDataset
from training.engine import World
from training.job import TrainJob
from training.stop import StopRequest
from training.validation import first_of_each_bucket


@torch.no_grad()
def sample_videos(
    student: VelocityFunction,
    job: TrainJob,
    dataset: LatentDataset,
    count: int,
    folder: Path,
    world: World,
    stop: StopRequest,
) -> bool:
    """Stream one buffer's length of video for the first captions; every rank takes part.

    The n-th video always has the same caption and noise, so videos of two steps compare. Written
    as GIFs named by clip, which MLflow shows in the browser.

    Args:
        student: the model under training.
        job: sampling settings.
        dataset: held-out clips.
        count: videos of all ranks together (fewer if there are fewer clips).
        folder: where they are written.
        world: this process.
        stop: looked at before each step.

    Returns:
        Whether all were made; False if a request to stop broke it off.
    """
    clips = first_of_each_bucket(dataset, count)
    with dataset.autoencoder_source() as source:
        autoencoder = load_autoencoder(source, world.device)
    rates = {
        clip: bucket.fps
        for bucket in dataset.manifest.buckets
        for clip in dataset.buckets.get(bucket.name, ())
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Every rank makes the same number of forward passes, which ZeRO-3 needs; a rank that has run
    # out of clips repeats one without keeping it.
    for start in range(0, len(clips), world.size):
        index = min(start + world.rank, len(clips) - 1)
        made = _stream(student, job, dataset, clips[index], index, autoencoder, world, stop)
        if made is None:
            return False
        clip_id, frames = made
        if start + world.rank < len(clips):
            write_gif(folder / f"{index:02d}-{clip_id}.gif", frames, rates[clips[index]])
    world.barrier()
    return True


def _stream(
    student: VelocityFunction,
    job: TrainJob,
    dataset: LatentDataset,
    clip: int,
    seed: int,
    autoencoder: Autoencoder,
    world: World,
    stop: StopRequest,
) -> tuple[str, np.ndarray] | None:
    """Clip id, and frames uint8 `[n, H, W, 3]` streamed for its caption; None if broken off."""
    sampling, buffer_frames = job.sampling, job.model.buffer_frames
    sample = dataset.sample(clip, buffer_frames, torch.Generator().manual_seed(seed))
    denoiser = Denoiser(
        student,
        PartitionScheme.from_sampling(buffer_frames, sampling),
        tuple(sample["latents"].shape[1:]),
        [seed],
        job.partition.gamma,
        sampling.guidance_scale,
        world.device,
        StreamStart(sampling.start),
    )
    null_text = dataset.null_text().to(world.device)
    denoiser.set_text(TextStates.collate([sample["text"]]).to(world.device), null_text)
    decoder = ChunkDecoder(autoencoder, world.device)
    pictures, made = [], 0
    while made < buffer_frames:
        if stop.asked():
            return None
        latents = denoiser.step()
        if latents is not None:
            made += latents.shape[1]
            pictures.append(decoder.submit(latents).wait())
    return sample["clip_id"], np.concatenate(pictures)


def write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames uint8 `[n, H, W, 3]` as an endless GIF."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    # GIF counts in hundredths of a second.
    duration = max(20, round(100 / fps) * 10)
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0)
