"""Typed configuration of ingestion: what a clip is, and how each of the three jobs works."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from streamdit.config import StrictModel, TextEncoderConfig


class BucketShape(StrictModel):
    """One size and length of clips; latents of a batch, and of a file, share it."""

    frames: int = Field(default=64, gt=0)
    """Video frames of a clip; a multiple of the autoencoder's temporal factor."""
    height: int = Field(default=512, gt=0)
    """Picture rows; a multiple of the autoencoder's spatial factor."""
    width: int = Field(default=512, gt=0)
    """Picture columns; a multiple of the autoencoder's spatial factor."""

    @property
    def name(self) -> str:
        """`{frames}x{height}x{width}`."""
        return f"{self.frames}x{self.height}x{self.width}"


class ClipConfig(BucketShape):
    """The training clip: its length, rate and picture size."""

    fps: float = Field(default=16.0, gt=0)
    """Frames per second that clips are resampled to."""
    stride_frames: int = Field(default=64, gt=0)
    """Distance between the starts of two clips of one scene, in clip frames; less than `frames`
    makes them overlap."""
    buckets: tuple[BucketShape, ...] = ()
    """Further sizes and lengths. A scene is cut into clips of the longest length that fits, what is
    left at its end into shorter ones; a clip goes to the size whose shape is nearest to the
    video's."""

    @property
    def shapes(self) -> tuple[BucketShape, ...]:
        """All buckets, in the order of the configuration, each once."""
        own = BucketShape(frames=self.frames, height=self.height, width=self.width)
        return tuple({shape.name: shape for shape in (own, *self.buckets)}.values())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of clips in frames, the longest first."""
        return tuple(sorted({shape.frames for shape in self.shapes}, reverse=True))

    @property
    def duration_s(self) -> float:
        """Seconds that the shortest clip covers."""
        return self.lengths[-1] / self.fps


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

    captioner: Literal["sidecar", "coca", "endpoint"] = "sidecar"
    """`sidecar`: `.vtt`, `.json` or `.txt` beside the video, in this order of preference. `coca`:
    open_clip's CoCa describes every clip. `endpoint`: a vision model behind an OpenAI-compatible
    server does. Sidecars are read by the first only."""
    model: str = "coca_ViT-L-14"
    """open_clip model name, `hf-hub:org/name` or `local-dir:/path` (`coca`), or the name by which
    the server knows its model (`endpoint`)."""
    pretrained: str | None = "mscoco_finetuned_laion2b_s13b_b90k"
    """open_clip weights tag or checkpoint path; not used with `hf-hub:` and `local-dir:`."""
    batch: int = Field(default=16, gt=0)
    """Pictures captioned at once."""
    max_tokens: int = Field(default=40, gt=1)
    """Longest caption in tokens."""
    frames: int = Field(default=3, gt=0)
    """Frames looked at per clip, evenly spread; `coca` describes the middle one, `endpoint` all."""
    prompt: str = "Describe this video in one or two sentences: who or what, doing what, where."
    """What the model is asked (`endpoint` only)."""
    url: str | None = None
    """Address of the server up to its version, such as `http://localhost:8000/v1` (`endpoint`)."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key, if it wants one (`endpoint`)."""
    concurrency: int = Field(default=8, gt=0)
    """Requests under way at once, of each worker (`endpoint`)."""
    retries: int = Field(default=5, ge=0)
    """Times that a request is sent again after a failure that may pass (`endpoint`)."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for an answer (`endpoint`)."""

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide what captions say; how to reach a server does not."""
        return self.model_dump(
            mode="json",
            exclude={"url", "api_key_env", "concurrency", "retries", "timeout_s"},
        )


class ClipScoreConfig(StrictModel):
    """Scores by a CLIP model of open_clip."""

    model: str | None = None
    """open_clip model name, `hf-hub:org/name` or `local-dir:/path`; none leaves the scores out."""
    pretrained: str | None = None
    """open_clip weights tag or checkpoint path; not used with `hf-hub:` and `local-dir:`."""
    aesthetic_head: str | None = None
    """File of a linear head for `aesthetic`, trained on this model's picture embeddings."""
    unsafe_head: str | None = None
    """File of a linear head for `unsafe`; a sigmoid turns its number into a probability."""
    batch: int = Field(default=16, gt=0)
    """Pictures or captions at once."""


class ScoreConfig(StrictModel):
    """Scores that take a model; the others are always measured."""

    text_area: bool = False
    """Measure `text_area`, the share of the picture that is writing; needs the extra `ocr`."""
    clip: ClipScoreConfig = ClipScoreConfig()
    """`clip_similarity`, `aesthetic` and `unsafe`."""
    duplicate_bits: int = Field(default=11, ge=0, le=11)
    """Near duplicates differ in at most this many of the 192 bits of `phash`. Other sizes and
    encodings of a clip differ in up to about 8, neighbouring clips of a calm scene in 14."""

    @property
    def content(self) -> dict[str, Any]:
        """What the scores of a clip depend on; its duplicates are found afterwards."""
        return self.model_dump(mode="json", exclude={"duplicate_bits"})


class AnnotateConfig(StrictModel):
    """How the models for captions and scores run."""

    gpus: float = Field(default=0.0, ge=0.0)
    """GPUs held by an actor with these models, fractions allowed; 0 runs them on the CPU."""


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
    compression: Literal["none", "zstd"] = "none"
    """Of shards: zstd makes those of plain pictures smaller, noisy ones hardly, and is many times
    slower to read. Trainers read both."""


class EncodeConfig(StrictModel):
    """How encoders run."""

    batch: int = Field(default=4, gt=0)
    """Clips encoded at once."""
    autoencoder_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs held by an actor with the autoencoder, fractions allowed; 0 encodes on the CPU."""
    decoders: int = Field(default=1, gt=0)
    """Decoder processes of such an actor; raise it until the autoencoder never waits."""
    clips_ahead: int = Field(default=8, gt=0)
    """Clips decoded ahead, in memory that the decoders share with the autoencoder."""
    text_batch: int = Field(default=16, gt=0)
    """Captions encoded at once."""
    text_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs held by an actor with the text encoders, fractions allowed; 0 encodes on the CPU."""


class DecodeConfig(StrictModel):
    """Limits on decoders, which run in child processes."""

    deadline_s: float = Field(default=900.0, gt=0)
    """Longest time for one piece of work: the next picture of a whole pass over a video, the sparse
    frames of some clips, or one clip. A decoder that takes longer is killed and its video becomes a
    dead letter."""
    salvage: bool = False
    """Take the good beginning of a video that is damaged or cut off, instead of none of it."""
    still: bool = False
    """Take videos in which nothing ever moves too; otherwise each is a dead letter."""


class LimitsConfig(StrictModel):
    """When a job gives up, because too much of its input fails."""

    dead_share: float = Field(default=0.2, ge=0.0, le=1.0)
    """A stage stops when more than this share of its inputs failed."""
    least_inputs: int = Field(default=50, gt=0)
    """Inputs after which the share is looked at first."""


class IngestConfig(StrictModel):
    """Everything that `curate`, `annotate` and `encode` need to know."""

    clip: ClipConfig = ClipConfig()
    """The training clip."""
    scenes: SceneConfig = SceneConfig()
    """Scene detection."""
    captions: CaptionConfig = CaptionConfig()
    """Captions."""
    scores: ScoreConfig = ScoreConfig()
    """Scores by models."""
    annotate: AnnotateConfig = AnnotateConfig()
    """Where these models run."""
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
    limits: LimitsConfig = LimitsConfig()
    """When to give up."""

    @field_validator("text_encoders")
    @classmethod
    def _unique_names(
        cls, encoders: tuple[TextEncoderConfig, ...]
    ) -> tuple[TextEncoderConfig, ...]:
        names = [encoder.name for encoder in encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"text encoder names {names} repeat; give each its own")
        return encoders
