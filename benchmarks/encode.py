"""An encode actor against bare loops with the same autoencoder: `python benchmarks/encode.py`.

In one run, the rounds in turn: our actor (decoders in processes of their own, shards written), the
same clips decoded and encoded one batch after the other in this process, and batches decoded
beforehand that are only encoded (the limit). Options: `--gpu`, `--clips N`, `--size PIXELS`,
`--decoders N`, `--width N` of the autoencoder, which sets how long it takes.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from pipeline.annotate import annotate
from pipeline.clips import read_clip
from pipeline.config import IngestConfig
from pipeline.curate import curate
from pipeline.graph import Row
from pipeline.latents import encode_frames
from pipeline.ledger import Ledger
from pipeline.pending import latent_settings
from pipeline.plan import read_plan
from pipeline.schema import AUTOENCODER_FOLDER, read_clips
from pipeline.settings import adopt_settings
from pipeline.stage_latents import EncodeLatents
from pipeline.store import open_store
from streamdit.autoencoder import (
    Autoencoder,
    CausalAutoencoder,
    CausalAutoencoderConfig,
    load_autoencoder,
    save_autoencoder,
)

ROUNDS = 3
FRAMES, FPS = 32, 16


def write_video(path: Path, clips: int, size: int) -> None:
    """A moving texture, as hard to decode as ordinary video."""
    texture = np.random.default_rng(0).integers(0, 256, (size // 8, size // 4, 3), np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
        for i in range(clips * FRAMES):
            picture = np.ascontiguousarray(np.roll(texture, 3 * i, axis=1)[:, :size])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def prepare(folder: Path, options: argparse.Namespace) -> IngestConfig:
    """A curated and annotated dataset of one video, and an autoencoder in it."""
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "v.mp4", options.clips, options.size)
    shape = {"frames": FRAMES, "fps": FPS, "height": options.size, "width": options.size}
    config = IngestConfig.model_validate(
        {
            "clip": {**shape, "stride_frames": FRAMES},
            "scenes": {"detector": "threshold"},
            "encode": {
                "batch": 4,
                "decoders": options.decoders,
                "autoencoder_gpus": 1.0 if options.gpu else 0.0,
            },
        }
    )
    curate([str(folder / "videos")], folder / "data", config)
    annotate(folder / "data", config)
    autoencoder = CausalAutoencoder(
        CausalAutoencoderConfig(
            latent_channels=8,
            patch=(4, 4, 4),
            widths=(options.width, options.width),
            strides=((1, 2, 2),),
            encoder_blocks=(1, 1),
            decoder_blocks=(1, 1),
        )
    )
    save_autoencoder(autoencoder, folder / "data" / AUTOENCODER_FOLDER)
    return config


def our_actor(folder: Path, config: IngestConfig) -> Callable[[], None]:
    """One call does the whole unit again."""
    store = open_store(folder / "data")
    identity = load_autoencoder(folder / "data" / AUTOENCODER_FOLDER).identity
    identity = identity.model_copy(update={"source": AUTOENCODER_FOLDER})
    (settings,) = adopt_settings(
        store, {"latents": latent_settings(config, identity)}, config
    ).values()
    actor = EncodeLatents(store.root, identity, config)
    (unit,) = read_plan(store)
    ledger = Ledger(store, "latents")

    def run() -> None:
        store.delete(ledger.path(unit.name))
        list(actor({"unit": unit.name, "settings": settings, "retry_dead": False}))

    return run


def decode(clip: Row) -> np.ndarray:
    return read_clip(*(clip[n] for n in ("uri", "start_s", "frames", "fps", "height", "width")))


def sequential(autoencoder: Autoencoder, clips: list[Row], batch: int) -> Callable[[], None]:
    """Decode a batch, encode it, and so on."""

    def run() -> None:
        for first in range(0, len(clips), batch):
            frames = np.stack([decode(clip) for clip in clips[first : first + batch]])
            encode_frames(autoencoder, frames, torch.bfloat16)

    return run


def encode_only(autoencoder: Autoencoder, clips: list[Row], batch: int) -> Callable[[], None]:
    """Encode what is decoded already: no actor can be faster."""
    frames = np.stack([decode(clip) for clip in clips])

    def run() -> None:
        for first in range(0, len(clips), batch):
            encode_frames(autoencoder, frames[first : first + batch], torch.bfloat16)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Encoding against bare loops.")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--decoders", type=int, default=1)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="encode-"))
    try:
        config = prepare(folder, options)
        device = "cuda" if options.gpu else "cpu"
        autoencoder = load_autoencoder(folder / "data" / AUTOENCODER_FOLDER, device)
        clips = read_clips(folder / "data").to_pylist()
        ways = {
            "encode only (limit)": encode_only(autoencoder, clips, config.encode.batch),
            "our actor": our_actor(folder, config),
            "decode, then encode": sequential(autoencoder, clips, config.encode.batch),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            run()  # loads models, starts decoders
        for _ in range(ROUNDS):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
        print(f"{len(clips)} clips of {config.clip.name}, {device}, {options.decoders} decoders")
        for name, times in seconds.items():
            pairs = zip(seconds["our actor"], times, strict=True)
            ratio = statistics.median(other / ours for ours, other in pairs)
            speed = len(clips) / min(times)
            print(f"{name:20} {speed:7.2f} clips/s   speed of ours / this {ratio:.2f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
