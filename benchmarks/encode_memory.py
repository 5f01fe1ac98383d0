"""What encoding takes in memory as a shard grows: `python benchmarks/encode_memory.py`.

An encode actor writes one shard of few, then of many latents of 1.5 MB, each time in a fresh
process; printed is by how much the peak of resident memory lies above that before the first clip.
Bounded by row group and batch, it stays where it is however long the shard. Option: `--clips N...`.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch

from pipeline.annotate import annotate
from pipeline.config import IngestConfig
from pipeline.curate import curate
from pipeline.ledger import Ledger
from pipeline.pending import latent_settings
from pipeline.plan import read_plan
from pipeline.schema import AUTOENCODER_FOLDER
from pipeline.settings import adopt_settings
from pipeline.stage_latents import EncodeLatents
from pipeline.store import open_store
from streamdit.autoencoder import (
    CausalAutoencoder,
    CausalAutoencoderConfig,
    load_autoencoder,
    save_autoencoder,
)

FRAMES, SIZE, FPS = 64, 128, 16
CHANNELS = 192
"""Of a latent `[16, 192, 16, 16]`: 1.5 MB in bfloat16."""
SHARD_MB = 4096.0


def ingest_config() -> IngestConfig:
    return IngestConfig.model_validate(
        {
            "clip": {"frames": FRAMES, "fps": FPS, "height": SIZE, "width": SIZE},
            "scenes": {"detector": "threshold"},
            "shards": {"shard_mb": SHARD_MB},
        }
    )


def write_video(path: Path, clips: int) -> None:
    """A moving texture."""
    texture = np.random.default_rng(0).integers(0, 256, (SIZE, 2 * SIZE, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for i in range(clips * FRAMES):
            picture = np.ascontiguousarray(np.roll(texture, 3 * i, axis=1)[:, :SIZE])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def prepare(folder: Path, clips: int) -> None:
    """A curated and annotated dataset of one video, and an autoencoder in it."""
    (folder / "videos").mkdir(parents=True)
    write_video(folder / "videos" / "v.mp4", clips)
    config = ingest_config()
    curate([str(folder / "videos")], folder / "data", config)
    annotate(folder / "data", config)
    autoencoder = CausalAutoencoder(
        CausalAutoencoderConfig(
            latent_channels=CHANNELS,
            patch=(4, 8, 8),
            widths=(8,),
            strides=(),
            encoder_blocks=(1,),
            decoder_blocks=(1,),
        )
    )
    save_autoencoder(autoencoder, folder / "data" / AUTOENCODER_FOLDER)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def encode(folder: Path) -> None:
    """Encode the dataset's one unit; prints clips, bytes of the shard and growth of the peak."""
    torch.set_num_threads(1)
    config, store = ingest_config(), open_store(folder / "data")
    identity = load_autoencoder(folder / "data" / AUTOENCODER_FOLDER).identity
    identity = identity.model_copy(update={"source": AUTOENCODER_FOLDER})
    (settings,) = adopt_settings(
        store, {"latents": latent_settings(config, identity)}, config
    ).values()
    actor = EncodeLatents(store.root, identity, config)
    (unit,) = read_plan(store)
    before = peak_mb()
    list(actor({"unit": unit.name, "settings": settings, "retry_dead": False}))
    marker = Ledger(store, "latents").read(unit.name)
    assert marker is not None
    (shard,) = marker.files
    print(
        f"{shard.rows:6} clips   shard {shard.bytes / 1e6:7.0f} MB   "
        f"peak {peak_mb() - before:6.0f} MB above the start"
    )


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description="Memory of encoding as a shard grows.")
    parser.add_argument("--clips", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        encode(options.folder)
        return
    group = IngestConfig().shards.row_group_mb
    print(
        f"latents of 1.5 MB, batches of {IngestConfig().encode.batch}, row groups of {group:g} MB"
    )
    with tempfile.TemporaryDirectory(prefix="encode-memory-") as temporary:
        for clips in options.clips:
            folder = Path(temporary) / str(clips)
            prepare(folder, clips)
            command = [sys.executable, __file__, "--folder", str(folder)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
