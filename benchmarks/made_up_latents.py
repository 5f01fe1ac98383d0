"""A dataset directory of random latents, for benchmarks that need one of a certain shape."""

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
from streamdit.config import DiTConfig, TextEncoderConfig
from streamdit.hashing import file_sha256

WORDS = 12


def make_dataset(root: Path, model: DiTConfig, clips: int, rows_per_group: int = 16) -> Path:
    """Write `clips` random clips that `model` can train on; an existing data set is kept."""
    if (root / MANIFEST_FILE).is_file():
        return root
    (root / "autoencoder").parent.mkdir(parents=True, exist_ok=True)
    config = CausalAutoencoderConfig(
        latent_channels=model.latent_channels,
        patch=(1, 4, 4),
        widths=(8, 8),
        strides=((4, 2, 2),),
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 1),
    )
    identity = save_autoencoder(CausalAutoencoder(config), root / "autoencoder")
    grid = model.buckets[0]
    shape = (grid.frames, model.latent_channels, grid.height, grid.width)
    bucket = f"{4 * grid.frames}x{8 * grid.height}x{8 * grid.width}"
    generator = torch.Generator().manual_seed(0)
    names = list(model.text)
    latents, texts, index = [], [_text_row(NULL_CLIP_ID, model, generator)], []
    for number in range(clips):
        clip = f"clip-{number:06d}"
        data, sizes, dtype, crc = encode_tensor(torch.randn(shape, generator=generator).bfloat16())
        latents.append(
            {
                "clip_id": clip,
                "source_id": f"source-{number}",
                "frames": 4 * grid.frames,
                "latent": data,
                "latent_shape": sizes,
                "latent_dtype": dtype,
                "latent_crc": crc,
            }
        )
        texts.append(_text_row(clip, model, generator))
        group, row = divmod(number, rows_per_group)
        index.append(
            {"clip_id": clip, "source_id": f"source-{number}", "bucket": bucket, "caption": ""}
            | {"split": "train" if number else "held_out"}
            | {
                f"{kind}_{key}": value
                for kind, file in (("latent", "latents/a.parquet"), ("text", "text/a.parquet"))
                for key, value in (("file", file), ("row_group", group), ("row", row))
            }
        )
    schema = text_schema(names)
    files = (
        _write(root, "latents/a.parquet", "latent", latents, LATENT_SCHEMA, rows_per_group),
        _write(root, "text/a.parquet", "text", texts[1:], schema, rows_per_group),
        _write(root, NULL_TEXT_FILE, "text-null", texts[:1], schema, 1),
        _write(root, "selection/v1.parquet", "selection", index, SELECTION_SCHEMA, clips),
    )
    manifest = Manifest(
        fingerprint="random",
        autoencoder=identity.model_copy(update={"source": "autoencoder"}),
        text_encoders=tuple(
            TextEncoderConfig(name=name, kind="bytes", width=width, max_tokens=64)
            for name, width in model.text.items()
        ),
        buckets=(
            BucketRecord(
                name=bucket,
                frames=4 * grid.frames,
                height=8 * grid.height,
                width=8 * grid.width,
                fps=16.0,
                latent_shape=shape,
            ),
        ),
        selection=SelectionRecord(
            version=1, path="selection/v1.parquet", expression="true", rows=clips
        ),
        files=files,
    )
    (root / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2))
    return root


def _text_row(clip: str, model: DiTConfig, generator: torch.Generator) -> dict[str, object]:
    row: dict[str, object] = {"clip_id": clip, "caption": "", "caption_model": "none"}
    for name, width in model.text.items():
        states = torch.randn(WORDS, width, generator=generator).bfloat16()
        keys = (f"text_{name}{end}" for end in ("", "_shape", "_dtype", "_crc"))
        row |= dict(zip(keys, encode_tensor(states), strict=True))
    return row


def _write(
    root: Path, path: str, kind: str, rows: list[dict[str, object]], schema: pa.Schema, group: int
) -> FileRecord:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, target, row_group_size=group, compression="none")
    return FileRecord(
        path=path,
        kind=kind,
        rows=len(rows),
        bytes=target.stat().st_size,
        sha256=file_sha256(target),
    )
