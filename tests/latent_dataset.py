"""A small dataset directory in the contract's format, written without any decoding."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.schema import (
    LATENT_SCHEMA,
    MANIFEST_FILE,
    NULL_CLIP_ID,
    NULL_TEXT_FILE,
    SELECTION_SCHEMA,
    BucketRecord,
    FileRecord,
    Manifest,
    SelectionRecord,
    encode_tensor,
    text_schema,
)
from streamdit.autoencoder import CausalAutoencoder, CausalAutoencoderConfig, save_autoencoder
from streamdit.config import TextEncoderConfig
from streamdit.hashing import file_sha256
from streamdit.text import build_text_encoders

ENCODERS = (TextEncoderConfig(name="bytes", kind="bytes", width=16, max_tokens=16),)
CAPTIONS = ("a red circle", "a blue square moving left", "nothing")


def tiny_autoencoder(folder: Path, latent_channels: int = 4):
    torch.manual_seed(0)
    config = CausalAutoencoderConfig(
        latent_channels=latent_channels,
        patch=(1, 4, 4),
        widths=(8, 8),
        strides=((4, 2, 2),),
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 1),
    )
    return save_autoencoder(CausalAutoencoder(config), folder)


def write_dataset(
    root: Path, clips: int = 24, held_out: int = 4, rows_per_group: int = 5, frames: int = 4
) -> Path:
    """Latents `[frames, 4, 4, 4]` that depend on the caption, in one shard and one text shard."""
    root.mkdir(parents=True)
    identity = tiny_autoencoder(root / "autoencoder").model_copy(update={"source": "autoencoder"})
    encoders = build_text_encoders(ENCODERS)
    generator = torch.Generator().manual_seed(7)
    latent_rows, text_rows, index = [], [], []
    for number in range(clips):
        clip_id, kind = f"clip-{number:03d}", number % 3
        data, shape, dtype, crc = encode_tensor(
            (kind - 1 + 0.1 * torch.randn(frames, 4, 4, 4, generator=generator)).bfloat16()
        )
        latent_rows.append(
            {
                "clip_id": clip_id,
                "source_id": f"source-{number}",
                "frames": 4 * frames,
                "latent": data,
                "latent_shape": shape,
                "latent_dtype": dtype,
                "latent_crc": crc,
            }
        )
        text_rows.append(_text_row(clip_id, CAPTIONS[kind], encoders))
        index.append(
            {
                "clip_id": clip_id,
                "source_id": f"source-{number}",
                "bucket": f"{4 * frames}x32x32",
                "split": "held_out" if number >= clips - held_out else "train",
                "caption": CAPTIONS[kind],
                "latent_file": "latents/a.parquet",
                "latent_row_group": number // rows_per_group,
                "latent_row": number % rows_per_group,
                "text_file": "text/a.parquet",
                "text_row_group": number // rows_per_group,
                "text_row": number % rows_per_group,
            }
        )
    schema = text_schema(["bytes"])
    files = [
        _write(root, "latents/a.parquet", "latent", latent_rows, LATENT_SCHEMA, rows_per_group),
        _write(root, "text/a.parquet", "text", text_rows, schema, rows_per_group),
        _write(root, NULL_TEXT_FILE, "text-null", [_text_row(NULL_CLIP_ID, "", encoders)], schema),
        _write(root, "selection/v1.parquet", "selection", index, SELECTION_SCHEMA),
    ]
    manifest = Manifest(
        fingerprint="test",
        autoencoder=identity,
        text_encoders=ENCODERS,
        buckets=(
            BucketRecord(
                name=f"{4 * frames}x32x32",
                frames=4 * frames,
                height=32,
                width=32,
                fps=16.0,
                latent_shape=(frames, 4, 4, 4),
            ),
        ),
        selection=SelectionRecord(
            version=1, path="selection/v1.parquet", expression="true", rows=clips
        ),
        files=tuple(files),
    )
    (root / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2))
    return root


def _text_row(clip_id, caption, encoders):
    row = {"clip_id": clip_id, "caption": caption, "caption_model": "test"}
    states = encoders.encode([caption]).unpadded()[0]["bytes"]
    keys = ("text_bytes", "text_bytes_shape", "text_bytes_dtype", "text_bytes_crc")
    return row | dict(zip(keys, encode_tensor(states.bfloat16()), strict=True))


def _write(root, path, kind, rows, schema, group=1000):
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), target, row_group_size=group)
    return FileRecord(
        path=path,
        kind=kind,
        rows=len(rows),
        bytes=target.stat().st_size,
        sha256=file_sha256(target),
    )


def train_settings(**changes):
    """A training configuration for :func:`write_dataset` that runs in seconds."""
    return {
        "model": {
            "latent_channels": 4,
            "buckets": [{"frames": 4, "height": 4, "width": 4, "window": [2, 2, 2]}],
            "width": 32,
            "depth": 2,
            "heads": 2,
            "ffn_width": 64,
            "text": {"bytes": 16},
            "time_frequencies": 32,
        },
        "partition": {"entries": [{"chunk_frames": c} for c in (1, 2, 4)]},
        "sampling": {"chunk_frames": 1, "micro_steps": 2, "guidance_scale": 2.0},
        "steps": 6,
        "global_batch": 8,
        "optimizer": {"learning_rate": 2e-3},
        "ema_decay": 0.9,
        "precision": "float32",
        "log_every": 1,
        "checkpoint": {"every": 3, "keep": 2},
        "validation": {"every": 6, "samples": 4},
    } | changes
