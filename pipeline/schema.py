"""The dataset contract: tables, manifest, and tensors as bytes.

dataset/
  manifest.json        Manifest; written last, so a dataset that has one is complete
  plan.json, ledger/   which work there is and what of it is done (for reruns)
  sources/ clips/ duplicates/ annotations/ dead/      tables of metadata
  latents/ text/       shards: one row per clip, same clips in the same order in both
  selection/           versioned index of what one trains on
  autoencoder/         decoder of the latents, where it is a local directory
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from isal import isal_zlib
from pydantic import Field, ValidationError

from pipeline.store import DatasetPath, Store, open_store, walk_parquet
from streamdit.config import AutoencoderIdentity, StrictModel, TextEncoderConfig
from streamdit.errors import UserError

FORMAT_VERSION = 1
READERS = 8
MANIFEST_FILE = "manifest.json"
AUTOENCODER_FOLDER = "autoencoder"
NULL_TEXT_FILE = "text/null.parquet"
NULL_CLIP_ID = ""

FileKind = Literal[
    "source", "clip", "duplicate", "annotation", "latent", "text", "text-null", "selection", "dead"
]

FOLDERS: dict[str, str] = {
    "source": "sources",
    "clip": "clips",
    "duplicate": "duplicates",
    "annotation": "annotations",
    "latent": "latents",
    "text": "text",
    "dead": "dead",
}
"""Folder of each kind of table that units write."""

SOURCE_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("uri", pa.string()),
        ("bytes", pa.int64()),
        ("codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("frames", pa.int64()),
        ("duration_s", pa.float64()),
        ("scenes", pa.int32()),
        ("clips", pa.int32()),
        ("licence", pa.string()),
        ("attribution", pa.string()),
    ]
)
"""One row per video that could be decoded; width and height as displayed."""

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("source_id", pa.string()),
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("fps", pa.float64()),
        ("bucket", pa.string()),
        ("frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("scene", pa.int32()),
        ("scene_start_s", pa.float64()),
        ("scene_end_s", pa.float64()),
        ("licence", pa.string()),
        ("attribution", pa.string()),
        ("motion", pa.float64()),
        ("blur", pa.float64()),
        ("brightness", pa.float64()),
        ("black_share", pa.float64()),
        ("static_share", pa.float64()),
        ("letterbox", pa.float64()),
        ("phash", pa.string()),
    ]
)
"""One row per training clip: its address, and the scores of the low-resolution pass."""

ANNOTATION_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("caption", pa.string()),
        ("caption_model", pa.string()),
        ("caption_status", pa.string()),
        ("colourfulness", pa.float64()),
        ("text_area", pa.float64()),
        ("clip_similarity", pa.float64()),
        ("aesthetic", pa.float64()),
        ("unsafe", pa.float64()),
    ]
)
"""One row per clip. `caption_status` is `ok`, `missing` (no caption for this clip) or `failed`."""

DUPLICATE_SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("clip_id", pa.string()),
        ("duplicate", pa.bool_()),
        ("duplicate_of", pa.string()),
        ("duplicates", pa.int32()),
    ]
)
"""One row per clip that has near duplicates, ordered by the unit that it is in, and its id.

`duplicate_of` names the clip that stands for its group, the one whose source has most pixels; that
one itself is no `duplicate`. `duplicates` counts the clips of the group.
"""

DEAD_LETTER_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("stage", pa.string()),
        ("error_class", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
        ("retryable", pa.bool_()),
    ]
)
"""One row per input that failed; the span is empty where the whole source did."""

LATENT_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("source_id", pa.string()),
        ("frames", pa.int32()),
        ("latent", pa.large_binary()),
        ("latent_shape", pa.list_(pa.int32())),
        ("latent_dtype", pa.string()),
        ("latent_crc", pa.int64()),
    ]
)
"""One row per clip: the autoencoder's raw mean `[f, C, h, w]`; `frames` counts video frames."""

SELECTION_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("source_id", pa.string()),
        ("bucket", pa.string()),
        ("split", pa.string()),
        ("caption", pa.string()),
        ("latent_file", pa.string()),
        ("latent_row_group", pa.int32()),
        ("latent_row", pa.int32()),
        ("text_file", pa.string()),
        ("text_row_group", pa.int32()),
        ("text_row", pa.int32()),
    ]
)
"""One row per selected clip, ordered by (bucket, clip_id): where its latent and text lie.

Files are relative to the dataset directory; rows count within their row group. `split` is `train`
or `held_out`.
"""


ID_TYPE = np.dtype("S16")
"""Ids in an array: hexadecimal digits as bytes."""


def id_array(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of ids as :data:`ID_TYPE`, a third of what Python objects take or less."""
    return np.array(ids.to_pylist(), ID_TYPE)


def text_schema(encoders: Iterable[str]) -> pa.Schema:
    """Rows of a text shard: caption, and the unpadded states `[l, d]` of each encoder."""
    fields = [
        pa.field("clip_id", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("caption_model", pa.string()),
    ]
    for name in encoders:
        fields += [
            pa.field(f"text_{name}", pa.large_binary()),
            pa.field(f"text_{name}_shape", pa.list_(pa.int32())),
            pa.field(f"text_{name}_dtype", pa.string()),
            pa.field(f"text_{name}_crc", pa.int64()),
        ]
    return pa.schema(fields)


class FileRecord(StrictModel):
    """One file of the dataset."""

    path: str
    """Relative to the dataset directory."""
    kind: FileKind
    """What it holds."""
    rows: int = Field(ge=0)
    """Rows of the table."""
    bytes: int = Field(ge=0)
    """Size."""
    sha256: str
    """Hash of its bytes."""


class BucketRecord(StrictModel):
    """One size and length of clips."""

    name: str
    """`{frames}x{height}x{width}` in video frames and pixels."""
    frames: int = Field(gt=0)
    """Video frames of a clip."""
    height: int = Field(gt=0)
    """Pixel rows."""
    width: int = Field(gt=0)
    """Pixel columns."""
    fps: float = Field(gt=0)
    """Frames per second."""
    latent_shape: tuple[int, int, int, int]
    """`[f, C, h, w]` of a clip's latent."""


class SelectionRecord(StrictModel):
    """The index of clips that this manifest offers for training."""

    version: int = Field(gt=0)
    """Grows whenever the selected rows or the expression change."""
    path: str
    """Parquet file, relative to the dataset directory."""
    expression: str
    """Condition that clips fulfil."""
    rows: int = Field(ge=0)
    """Number of clips."""


class Manifest(StrictModel):
    """`manifest.json`: what a trainer needs to know before it opens a shard."""

    format_version: Literal[1] = 1
    """Version of the dataset layout."""
    fingerprint: str
    """Hash of the configuration, the encoders and the content of every listed file."""
    autoencoder: AutoencoderIdentity
    """Encoder of the latents; a relative `source` is relative to the dataset directory."""
    text_encoders: tuple[TextEncoderConfig, ...]
    """Encoders of the captions."""
    buckets: tuple[BucketRecord, ...]
    """Sizes and lengths in the dataset."""
    selection: SelectionRecord
    """What to train on."""
    files: tuple[FileRecord, ...]
    """Every table, sorted by path."""

    def files_of(self, kind: FileKind) -> tuple[FileRecord, ...]:
        """Records of one kind."""
        return tuple(record for record in self.files if record.kind == kind)


def load_manifest(dataset_dir: DatasetPath | Store) -> Manifest:
    """Read `manifest.json` of a dataset directory.

    Raises:
        UserError: if there is none, or this version cannot read it.
    """
    store = open_store(dataset_dir)
    path = store.uri(MANIFEST_FILE)
    try:
        text = store.read_text(MANIFEST_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"dataset {store.root} has no {MANIFEST_FILE}: it is not a dataset directory or its "
            "encoding is not finished; run `streamdit ingest` (again) to complete it"
        ) from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{path} does not fit format version {FORMAT_VERSION} ({where}: {first['msg']}); "
            "encode the dataset again with this version"
        ) from None


def read_clips(dataset_dir: DatasetPath | Store) -> pa.Table:
    """All training clips that `curate` found (:data:`CLIP_SCHEMA`), ordered by id.

    Raises:
        UserError: if there is no clip table.
    """
    return _require_tables(dataset_dir, "clip", CLIP_SCHEMA, "curate").sort_by("clip_id")


def read_annotations(dataset_dir: DatasetPath | Store) -> pa.Table:
    """Captions and scores that `annotate` wrote (:data:`ANNOTATION_SCHEMA`), ordered by clip id.

    Raises:
        UserError: if there is no annotation table.
    """
    table = _require_tables(dataset_dir, "annotation", ANNOTATION_SCHEMA, "annotate")
    return table.sort_by("clip_id")


def read_dead_letters(dataset_dir: DatasetPath | Store) -> pa.Table:
    """Inputs that failed in any stage (:data:`DEAD_LETTER_SCHEMA`); may be empty."""
    tables = read_tables(open_store(dataset_dir), FOLDERS["dead"], DEAD_LETTER_SCHEMA)
    return pa.concat_tables([DEAD_LETTER_SCHEMA.empty_table(), *tables]).sort_by(
        [("uri", "ascending"), ("stage", "ascending"), ("start_s", "ascending")]
    )


def read_sources(dataset_dir: DatasetPath | Store) -> pa.Table:
    """Videos that `curate` could decode (:data:`SOURCE_SCHEMA`), ordered by id.

    Raises:
        UserError: if there is no source table.
    """
    return _require_tables(dataset_dir, "source", SOURCE_SCHEMA, "curate").sort_by("source_id")


def _require_tables(
    dataset_dir: DatasetPath | Store, kind: str, schema: pa.Schema, stage: str
) -> pa.Table:
    """Every table of `kind`, as one."""
    tables = read_tables(open_store(dataset_dir), FOLDERS[kind], schema)
    if not tables:
        raise UserError(
            f"dataset {dataset_dir} has no {kind} table: run "
            f"`streamdit ingest --only {stage}` first"
        )
    return pa.concat_tables(tables)


def read_tables(store: Store, folder: str, schema: pa.Schema) -> list[pa.Table]:
    """Every published table below a folder, in order of their names."""
    paths = list(walk_parquet(store, folder))
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda path: pq.read_table(store.source(path), schema=schema), paths))


def encode_tensor(tensor: torch.Tensor) -> tuple[bytes, list[int], str, int]:
    """A tensor as it travels in a shard.

    Returns:
        Raw little-endian bytes, shape, dtype name (`bfloat16`, `float32`, ...), and the CRC-32 of
        the bytes.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes()
    return data, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), isal_zlib.crc32(data)


def decode_tensor(data: bytes, shape: Iterable[int], dtype: str) -> torch.Tensor:
    """The inverse of :func:`encode_tensor`; the result owns its memory."""
    tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    return tensor
