"""Typed configuration of a StreamDiT model and of everything that a model directory names.

Every class is a frozen pydantic model that refuses unknown keys. The objects here are the
contract between the rooms: the pipeline writes :class:`AutoencoderIdentity` and
:class:`TextEncoderConfig` into a dataset manifest, the trainer copies them into
:class:`StreamDiTConfig`, and :func:`streamdit.load` rebuilds the stream from it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Triple = tuple[int, int, int]

StartKind = Literal["text-to-video", "ramp"]
"""How a stream fills its first buffer; see :class:`streamdit.schedule.StreamSchedule`."""

FORMAT_VERSION = 1


class StrictModel(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BucketConfig(StrictModel):
    """One latent grid that the model serves, with the attention window used on it."""

    frames: int = Field(gt=0)
    """Latent frames; equals the buffer length B."""
    height: int = Field(gt=0)
    """Latent rows (video height divided by the autoencoder's spatial factor)."""
    width: int = Field(gt=0)
    """Latent columns."""
    window: Triple
    """Attention window `[Fw, Hw, Ww]` in tokens; each entry divides the token grid."""


class DiTConfig(StrictModel):
    """Shape of the diffusion transformer (arXiv:2507.03745v4, Sec. 3.3 and Fig. 3)."""

    latent_channels: int = Field(gt=0)
    """Channels of one latent frame."""
    buckets: tuple[BucketConfig, ...] = Field(min_length=1)
    """Latent grids that the model serves; all have the same number of frames B."""
    patch: Triple = (1, 2, 2)
    """Latent voxels merged into one token along (frame, row, column)."""
    width: int = Field(gt=0)
    """Token width."""
    depth: int = Field(gt=0)
    """Number of transformer blocks."""
    heads: int = Field(gt=0)
    """Attention heads; `width / heads` must be even and at least 6 (3D rotary positions)."""
    ffn_width: int = Field(gt=0)
    """Hidden width of the feed-forward network."""
    modulation: Literal["zero", "single"] = "zero"
    """`zero`: every block has its own adaLN-zero projection of the time embedding. `single`: one
    projection for all blocks plus a learned table per block and for the output (as PixArt and Wan
    do)."""
    time_axis: Literal["tau", "noise"] = "tau"
    """What the time embedding is given: tau, or the noise level 1 - tau (as Wan is)."""
    temporal_wrap: bool = True
    """Whether shifted windows wrap around in time too, so that the newest frames of the buffer also
    meet the oldest. Rows and columns always wrap."""
    text: dict[str, int] = Field(min_length=1)
    """Width of each text encoder's states, by the encoder's name."""
    text_norm: bool = True
    """Layer norm of text states before their projection."""
    text_padding: int | None = Field(default=None, gt=0)
    """Tokens that each encoder's states are filled up to with zeros, which are attended to like
    text (as in Wan). None: padding is masked out, and left out where nothing is padded."""
    qk_norm: Literal["per_head", "across_heads", "none"] = "per_head"
    """Root-mean-square normalisation of queries and keys: of every head, of all heads together (as
    in Wan), or none."""
    rope_theta: float = Field(default=10_000.0, gt=1.0)
    """Base of the rotary frequencies."""
    absolute_position: bool = False
    """Also add fixed sinusoidal 3D positions to the tokens. Rotary positions alone say where tokens
    are relative to each other; small models learn sooner where in the picture they are."""
    time_frequencies: int = Field(default=256, gt=0, multiple_of=2)
    """Width of the sinusoidal features of tau before the time embedding."""

    @model_validator(mode="after")
    def _check_shapes(self) -> DiTConfig:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; "
                "choose heads that divide width"
            )
        head_width = self.width // self.heads
        if head_width % 2 or head_width < 6:
            raise ValueError(
                f"head width {head_width} (width / heads) must be even and at least 6 for 3D "
                "rotary positions; change width or heads"
            )
        frames = {bucket.frames for bucket in self.buckets}
        if len(frames) > 1:
            raise ValueError(
                f"buckets have different frame counts {sorted(frames)}; the buffer length B is "
                "one number per model, so give every bucket the same"
            )
        if self.patch[0] != 1:
            raise ValueError(
                f"patch {list(self.patch)} merges frames, but every latent frame has its own tau; "
                "use 1 as the first entry"
            )
        for bucket in self.buckets:
            grid = self.token_grid(bucket)
            for axis, voxels, step in zip(
                ("frames", "height", "width"),
                (bucket.frames, bucket.height, bucket.width),
                self.patch,
                strict=True,
            ):
                if voxels % step:
                    raise ValueError(
                        f"bucket {axis} {voxels} is not divisible by patch {step}; "
                        "change the bucket or the patch"
                    )
            if any(g % w for g, w in zip(grid, bucket.window, strict=True)):
                raise ValueError(
                    f"window {list(bucket.window)} does not divide the token grid {list(grid)} of "
                    f"bucket {bucket.frames}x{bucket.height}x{bucket.width}; choose a divisor on "
                    "every axis"
                )
        return self

    @property
    def buffer_frames(self) -> int:
        """Latent frames in the buffer, B."""
        return self.buckets[0].frames

    def token_grid(self, bucket: BucketConfig) -> Triple:
        """Tokens along (frames, rows, columns) for `bucket`."""
        return (
            bucket.frames // self.patch[0],
            bucket.height // self.patch[1],
            bucket.width // self.patch[2],
        )

    def window_for(self, frames: int, height: int, width: int) -> Triple:
        """Attention window for a latent grid.

        Raises:
            ValueError: if no bucket of the configuration has this grid.
        """
        for bucket in self.buckets:
            if (bucket.frames, bucket.height, bucket.width) == (frames, height, width):
                return bucket.window
        known = ", ".join(f"{b.frames}x{b.height}x{b.width}" for b in self.buckets)
        raise ValueError(
            f"latents of {frames}x{height}x{width} fit no bucket of this model ({known}); "
            "resize the video, or add a bucket with its window to model.buckets"
        )


class GammaConfig(StrictModel):
    """Noise schedule gamma: [0, 1] -> [0, 1] (arXiv:2507.03745v4, Eq. 9)."""

    kind: Literal["linear", "exponential", "shifted"] = "linear"
    """`linear`: gamma(t) = t. `exponential`: gamma(t) = t ** power. `shifted`: gamma(t) =
    t / (shift - (shift - 1) t), under which most open video models were trained and are sampled."""
    power: float = 1.0
    """Exponent k of the exponential schedule; greater than 1 spends more steps near noise."""
    shift: float = 1.0
    """Shift of the shifted schedule; greater than 1 spends more steps near noise."""

    @model_validator(mode="after")
    def _check_values(self) -> GammaConfig:
        for name, value, kind in (
            ("power", self.power, "exponential"),
            ("shift", self.shift, "shifted"),
        ):
            if self.kind != kind and value != 1.0:
                raise ValueError(
                    f"{name} {value} has no meaning for the {self.kind} schedule; "
                    f"remove it or use kind: {kind}"
                )
            if self.kind == kind and value <= 1.0:
                raise ValueError(f"{name} {value} must be greater than 1 for kind: {kind}")
        return self


class PartitionEntry(StrictModel):
    """One partition of the buffer in the training mix."""

    chunk_frames: int = Field(gt=0)
    """Latent frames per chunk, c."""
    reference_frames: int = Field(default=0, ge=0)
    """Clean reference frames at the head, K."""
    weight: float = Field(default=1.0, gt=0.0)
    """Relative probability of the entry."""


class PartitionConfig(StrictModel):
    """The training mix of partitions (arXiv:2507.03745v4, Sec. 3.2) and its noise schedule."""

    entries: tuple[PartitionEntry, ...] = Field(min_length=1)
    """Partitions drawn at random, one per sample."""
    gamma: GammaConfig = GammaConfig()
    """Noise schedule, the same in training, distillation and sampling."""
    sigma_min: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Noise left at tau = 1 (Eq. 1)."""


class SamplingConfig(StrictModel):
    """How a model is meant to be streamed: its default scheme and guidance."""

    chunk_frames: int = Field(gt=0)
    """Latent frames emitted at once, c."""
    micro_steps: int = Field(gt=0)
    """Denoising steps per emitted chunk, s."""
    reference_frames: int = Field(default=0, ge=0)
    """Clean reference frames kept at the head, K."""
    guidance_scale: float = Field(default=1.0, ge=0.0)
    """Classifier-free guidance weight w; 1 means one evaluation per step, without guidance."""
    start: StartKind = "text-to-video"
    """How a stream fills its first buffer. `text-to-video`: as an ordinary video, which the model
    must have been trained for (K = 0, c = B). `ramp`: chunk after chunk begins to walk."""

    @model_validator(mode="after")
    def _check_start(self) -> SamplingConfig:
        if self.start == "ramp" and self.reference_frames:
            raise ValueError(
                f"start: ramp makes no references, but reference_frames is "
                f"{self.reference_frames}; use start: text-to-video"
            )
        return self


class DistilledScheme(StrictModel):
    """A scheme (with s = 1) that a model was distilled for."""

    chunk_frames: int = Field(gt=0)
    """Latent frames emitted at once, c."""
    reference_frames: int = Field(default=0, ge=0)
    """Clean reference frames, K."""


class DistillationRecord(StrictModel):
    """What a distilled model was distilled for, which is all that it can be asked for."""

    schemes: tuple[DistilledScheme, ...] = Field(min_length=1)
    """Schemes, each with one step per chunk (s = 1) and without guidance (w = 1)."""
    starts: tuple[StartKind, ...] = Field(min_length=1)
    """Ways of filling the first buffer that it was taught."""
    continues: bool = False
    """Whether it was taught to fill its buffer behind the references of a given video, too."""
    teacher_sha256: str
    """Hash of the teacher's weights."""
    teacher_micro_steps: int = Field(gt=0)
    """Steps per chunk of the teacher, s."""
    teacher_guidance_scale: float = Field(ge=0)
    """Guidance weight of the teacher, w (the mean of the segments' weights)."""
    teacher_guidance_by_segment: tuple[float, ...] = ()
    """Its weight for each noise segment, where these differ."""


class AutoencoderIdentity(StrictModel):
    """Which autoencoder made (and decodes) the latents, and how they are normalised."""

    kind: Literal["causal", "wan"]
    """`causal`: this project's own; `wan`: diffusers' `AutoencoderKLWan`."""
    source: str
    """Directory or hub id that it loads from; relative paths are relative to the file that
    holds this record."""
    sha256: str
    """Hash of the weights."""
    latent_channels: int = Field(gt=0)
    """Channels of a latent frame."""
    temporal_factor: int = Field(default=4, gt=0)
    """Video frames per latent frame."""
    spatial_factor: int = Field(default=8, gt=0)
    """Pixels per latent row and column."""
    first_frame_alone: bool = False
    """Whether a clip's first latent encodes a single frame (clips of 1 + 4k frames)."""
    scale: tuple[float, ...]
    """Per channel: `normalised = (latent - shift) * scale`."""
    shift: tuple[float, ...]
    """Per channel, see `scale`."""

    @model_validator(mode="after")
    def _check_channels(self) -> AutoencoderIdentity:
        if not len(self.scale) == len(self.shift) == self.latent_channels:
            raise ValueError(
                f"scale has {len(self.scale)} and shift {len(self.shift)} entries for "
                f"{self.latent_channels} latent channels; give one each per channel"
            )
        return self


class TextEncoderConfig(StrictModel):
    """One text encoder, by what it is and where its weights are."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    """Name under which its states travel (columns of shards, projectors of the model)."""
    kind: Literal["bytes", "t5", "open_clip"]
    """`bytes`: hashed byte n-grams, needs no weights. `t5`: T5, UL2, UMT5 or ByT5 encoder from
    transformers. `open_clip`: text tower of an open_clip model (MetaCLIP)."""
    source: str | None = None
    """Hub id or local path of the model, or of a diffusers pipeline with it (`t5`), or open_clip
    model name; not used by `bytes`."""
    pretrained: str | None = None
    """open_clip weights tag or checkpoint path."""
    width: int = Field(gt=0)
    """Width of the states."""
    max_tokens: int = Field(gt=0)
    """Longest sequence; longer text is cut."""

    @model_validator(mode="after")
    def _check_source(self) -> TextEncoderConfig:
        if self.kind != "bytes" and not self.source:
            raise ValueError(
                f"text encoder {self.name!r} of kind {self.kind} needs `source` (a hub id, model "
                "name or local path)"
            )
        return self


class StreamDiTConfig(StrictModel):
    """`config.json` of a model directory: all that is needed to stream from its weights."""

    format_version: Literal[1] = 1
    """Version of the model directory's layout."""
    model: DiTConfig
    """The transformer."""
    partition: PartitionConfig
    """Partitions and noise schedule that it was trained with."""
    sampling: SamplingConfig
    """Default scheme and guidance."""
    distilled: DistillationRecord | None = None
    """What the model was distilled for; None for a model that takes any number of steps."""
    autoencoder: AutoencoderIdentity
    """Decoder of its latents."""
    text_encoders: tuple[TextEncoderConfig, ...] = Field(min_length=1)
    """Encoders of its prompts."""
    fps: float = Field(gt=0)
    """Frames per second of the video that it was trained on."""
    weights_sha256: str = ""
    """Hash of `model.safetensors`; set when the directory is written."""
    lineage: dict[str, Any] = Field(default_factory=dict)
    """Where it came from: dataset fingerprint, run id, step, parent model."""

    @field_validator("text_encoders")
    @classmethod
    def _unique_names(
        cls, encoders: tuple[TextEncoderConfig, ...]
    ) -> tuple[TextEncoderConfig, ...]:
        names = [encoder.name for encoder in encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"text encoder names {names} repeat; give each its own")
        return encoders

    @model_validator(mode="after")
    def _check_parts_fit(self) -> StreamDiTConfig:
        widths = {encoder.name: encoder.width for encoder in self.text_encoders}
        if widths != self.model.text:
            raise ValueError(
                f"model.text {self.model.text} does not match the text encoders {widths}; "
                "they must name the same encoders with the same widths"
            )
        if self.autoencoder.latent_channels != self.model.latent_channels:
            raise ValueError(
                f"model.latent_channels {self.model.latent_channels} does not match the "
                f"autoencoder's {self.autoencoder.latent_channels}"
            )
        return self
