"""Typed configuration of ingestion: what a clip is, and how each of the three jobs works."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from streamdit.config import StrictModel, TextEncoderConfig


class ClipConfig(StrictModel):
    """The training clip: its length, rate and picture size."""

    frames: int = Field(default=64, gt=0)
    """Video frames of a clip; a multiple of the autoencoder's temporal factor."""
    fps: float = Field(default=16.0, gt=0)
    """Frames per second that clips are resampled to."""
    height: int = Field(default=512, gt=0)
    """Picture rows; a multiple of the autoencoder's spatial factor."""
    width: int = Field(default=512, gt=0)
    """Picture columns; a multiple of the autoencoder's spatial factor."""
    stride_frames: int = Field(default=64, gt=0)
    """Distance between the starts of two clips of one scene, in clip frames; less than `frames`
    makes them overlap."""

    @property
    def bucket(self) -> str:
        """Name of the bucket, `{frames}x{height}x{width}`."""
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def duration_s(self) -> float:
        """Seconds that a clip covers."""
        return self.frames / self.fps

    @property
    def stride_s(self) -> float:
        """Seconds between the starts of two clips."""
        return self.stride_frames / self.fps


class SceneConfig(StrictModel):
    """How scene boundaries are found, on one low-resolution pass."""

    detector: Literal["adaptive", "content", "threshold", "transnetv2"] = "adaptive"
    """`adaptive`: change relative to its neighbourhood, forgives camera motion. `content`: change
    of colour above a fixed level, for hard cuts. `threshold`: fades through black (these three are
    scenedetect's). `transnetv2`: a network that sees dissolves and wipes too and leaves their
    frames out; several times slower on a CPU, needs the extra `transnet`."""
    threshold: float | None = Field(default=None, gt=0)
    """Level at which the detector cuts; none takes its own default (adaptive 3, content 27,
    threshold 12, transnetv2 0.5)."""
    min_content: float = Field(default=15.0, ge=0)
    """Least colour change of a cut (`adaptive` only)."""
    min_scene_s: float = Field(default=0.6, ge=0)
    """Shortest scene in seconds; a cut that would end a shorter one is ignored."""
    scan_height: int = Field(default=180, gt=0)
    """Rows of the low-resolution pass; smaller videos are not enlarged."""
    trim_frames: int = Field(default=0, ge=0)
    """Source frames dropped on either side of a cut, against remains of transitions."""


class CaptionConfig(StrictModel):
    """Where captions come from."""

    captioner: Literal["sidecar", "coca"] = "sidecar"
    """`sidecar`: `.vtt`, `.json` or `.txt` beside the video, in this order of preference. `coca`:
    open_clip's CoCa describes every clip; sidecars are not read."""
    model: str = "coca_ViT-L-14"
    """open_clip model name, `hf-hub:org/name` or `local-dir:/path` (`coca` only)."""
    pretrained: str | None = "mscoco_finetuned_laion2b_s13b_b90k"
    """open_clip weights tag or checkpoint path; not used with `hf-hub:` and `local-dir:`."""
    batch: int = Field(default=16, gt=0)
    """Pictures captioned at once."""
    max_tokens: int = Field(default=40, gt=1)
    """Longest caption in tokens."""
    frames: int = Field(default=3, gt=0)
    """Frames looked at per clip, evenly spread; captions describe the middle one."""


class SelectionConfig(StrictModel):
    """Which clips are trained on."""

    expression: str = "true"
    """Condition over clip columns and scores, e.g. `motion > 0.3 and blur > 50`."""
    held_out_share: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of sources kept from training; a source is held out by a hash of its id."""


class ShardConfig(StrictModel):
    """Size and number format of Parquet shards."""

    row_group_mb: float = Field(default=24.0, gt=0)
    """Megabytes of payload in a row group, the unit of reading."""
    shard_mb: float = Field(default=512.0, gt=0)
    """Megabytes of payload in a file."""
    latent_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of latents."""
    text_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of text states."""


class EncodeConfig(StrictModel):
    """How encoders run."""

    batch: int = Field(default=4, gt=0)
    """Clips (and captions) encoded at once."""
    autoencoder_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs held by an encode actor, fractions allowed; 0 encodes on the CPU."""


class DecodeConfig(StrictModel):
    """Limits on decoders, which run in child processes."""

    deadline_s: float = Field(default=900.0, gt=0)
    """Longest time for one call (a whole pass over a video, the sparse frames of a video, or one
    clip); a decoder that takes longer is killed and its input becomes a dead letter."""


class IngestConfig(StrictModel):
    """Everything that `curate`, `annotate` and `encode` need to know."""

    clip: ClipConfig = ClipConfig()
    """The training clip."""
    scenes: SceneConfig = SceneConfig()
    """Scene detection."""
    captions: CaptionConfig = CaptionConfig()
    """Captions."""
    text_encoders: tuple[TextEncoderConfig, ...] = Field(
        default=(TextEncoderConfig(name="bytes", kind="bytes", width=256, max_tokens=64),),
        min_length=1,
    )
    """Text encoders whose states are stored."""
    selection: SelectionConfig = SelectionConfig()
    """Choice and split of clips."""
    unit_sources: int = Field(default=32, gt=0)
    """Sources in a unit, the piece of work that is done whole or again."""
    workers: int | None = Field(default=None, gt=0)
    """Units worked on at once; none means as many as the cluster's CPUs allow."""
    threads: int = Field(default=1, gt=0)
    """CPU threads of a worker; part of the fingerprint because it can change rounding."""
    shards: ShardConfig = ShardConfig()
    """Parquet shards."""
    encode: EncodeConfig = EncodeConfig()
    """Encoders."""
    decode: DecodeConfig = DecodeConfig()
    """Decoders."""

    @field_validator("text_encoders")
    @classmethod
    def _unique_names(
        cls, encoders: tuple[TextEncoderConfig, ...]
    ) -> tuple[TextEncoderConfig, ...]:
        names = [encoder.name for encoder in encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"text encoder names {names} repeat; give each its own")
        return encoders
