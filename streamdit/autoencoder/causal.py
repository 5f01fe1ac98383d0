"""The project's own causal video autoencoder: 4x in time, 8x in space, trained by its users.

The paper's autoencoder (the temporal autoencoder of Movie Gen, arXiv:2507.03745v4, Sec. 4.1) is
not public. This one keeps its factors and adds what streaming needs: every convolution looks back
in time only, and every norm sees one position only. So decoding chunk by chunk, with the last
frames that each convolution saw handed on, gives what decoding whole gives.

Every latent frame stands for four video frames, the first one included.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from streamdit.autoencoder.base import Autoencoder
from streamdit.config import AutoencoderIdentity, StrictModel, Triple
from streamdit.errors import UserError

TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8
FACTORS: Triple = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)

CausalState = tuple[Tensor, ...]
"""Last frames `[b, c, kt - 1, h, w]` that each convolution saw, in running order."""


class CausalAutoencoderConfig(StrictModel):
    """Shape of the causal autoencoder; the default (93M parameters) is meant for 512x512 video."""

    latent_channels: int = Field(default=16, gt=0)
    """Channels of a latent frame."""
    patch: Triple = (1, 2, 2)
    """Voxels along (frame, row, column) folded into channels before the first stage."""
    widths: tuple[int, ...] = Field(default=(96, 256, 512), min_length=1)
    """Channels of each stage, from pixels to latents."""
    strides: tuple[Triple, ...] = ((2, 2, 2), (2, 2, 2))
    """Reduction along (frame, row, column) between two stages; one fewer than the stages."""
    encoder_blocks: tuple[int, ...] = (2, 2, 2)
    """Residual blocks of each stage of the encoder."""
    decoder_blocks: tuple[int, ...] = (2, 3, 3)
    """Residual blocks of each stage of the decoder, from pixels to latents like `widths`."""

    @model_validator(mode="after")
    def _check_stages(self) -> CausalAutoencoderConfig:
        stages = len(self.widths)
        for name, found, wanted in (
            ("strides", len(self.strides), stages - 1),
            ("encoder_blocks", len(self.encoder_blocks), stages),
            ("decoder_blocks", len(self.decoder_blocks), stages),
        ):
            if found != wanted:
                raise ValueError(
                    f"{name} has {found} entries but {stages} widths need {wanted}; "
                    "give one stride between two stages, and one block count per stage"
                )
        factors = tuple(prod(axis) for axis in zip(self.patch, *self.strides, strict=True))
        if factors != FACTORS:
            raise ValueError(
                f"patch {list(self.patch)} times strides {[list(s) for s in self.strides]} reduces "
                f"by {list(factors)}; choose factors whose product is {list(FACTORS)}"
            )
        return self


class CausalAutoencoder(Autoencoder):
    """Causal convolutional autoencoder on top of a linear one.

    A linear map of 4x8x8 patches carries most of the picture (:meth:`fit_linear_path` makes it
    the best one for given clips); the networks add what it cannot, and start at zero.
    """

    def __init__(
        self, config: CausalAutoencoderConfig, identity: AutoencoderIdentity | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.identity = identity or unnamed_identity(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode a clip of 4k frames to raw latents (the posterior mean).

        Args:
            frames: `[b, 4k, 3, H, W]` floating in -1...1; H and W are multiples of 8.

        Returns:
            Latents `[b, k, C, H / 8, W / 8]` in the dtype of `frames`. Latent frame i depends on
            video frames up to 4i + 3 only.

        Raises:
            UserError: if the clip's length or size is not a multiple of the factors.
        """
        return self.posterior(frames)[0]

    def encode_next(
        self, frames: Tensor, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        """Encode the next 4k frames of a long clip; see :meth:`Autoencoder.encode_next`."""
        history = History(state, keep=True)
        return self._posterior(frames, history)[0], tuple(history.kept)

    def posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each `[b, f, C, h, w]`, of the latents of `frames`."""
        return self._posterior(frames, History())

    def _posterior(self, frames: Tensor, history: History) -> tuple[Tensor, Tensor]:
        check_clip(frames)
        moments = self.encoder(frames.transpose(1, 2).to(self.dtype), history)
        mean, logvar = moments.transpose(1, 2).to(frames.dtype).chunk(2, dim=2)
        return mean, logvar.clamp(-20.0, 10.0)

    def decode(
        self, latents: Tensor, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        """Decode the next latents of a stream; see :meth:`Autoencoder.decode`."""
        history = History(state, keep=True)
        frames = self.decoder(latents.transpose(1, 2).to(self.dtype), history)
        return frames.transpose(1, 2).to(latents.dtype), tuple(history.kept)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Frames `[b, 4f, 3, H, W]` of whole clips `[b, f, C, h, w]`, keeping no state."""
        frames = self.decoder(latents.transpose(1, 2).to(self.dtype), History())
        return frames.transpose(1, 2).to(latents.dtype)

    @torch.no_grad()
    def fit_linear_path(self, frames: Tensor, whiten: bool = True) -> None:
        """Set the linear path to the principal components of `frames` `[b, t, 3, H, W]`.

        Reconstruction then starts with the smallest error that a linear autoencoder of this many
        channels can reach, and the latents with about unit variance: per channel (`whiten`), or
        over all channels together, each keeping its own share of the variance.
        """
        check_clip(frames)
        patches = space_to_depth(frames.transpose(1, 2).float(), FACTORS)
        vectors = patches.permute(0, 2, 3, 4, 1).flatten(0, 3)
        mean, components, deviations = principal_components(vectors, self.config.latent_channels)
        if not whiten:
            deviations = deviations.square().mean().sqrt().expand_as(deviations)
        encode, decode = self.encoder.linear, self.decoder.linear
        assert encode.bias is not None
        assert decode.bias is not None
        rows = components / deviations[:, None]
        channels = len(rows)
        encode.weight[:channels] = rows[:, :, None, None, None].to(encode.weight)
        encode.bias[:channels] = -(rows @ mean).to(encode.bias)
        decode.weight.copy_((components.T * deviations)[:, :, None, None, None])
        decode.bias.copy_(mean)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type that the networks compute in."""
        return self.encoder.linear.weight.dtype


class Encoder(nn.Module):
    """Video `[b, 3, t, H, W]` to moments (mean, log variance) `[b, 2C, f, h, w]`."""

    def __init__(self, config: CausalAutoencoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        moments = 2 * config.latent_channels
        self.linear = nn.Conv3d(3 * prod(FACTORS), moments, 1)
        self.stem = nn.Conv3d(3 * prod(config.patch), config.widths[0], 1)
        self.stages = nn.ModuleList(
            Stage(width, blocks)
            for width, blocks in zip(config.widths, config.encoder_blocks, strict=True)
        )
        # A kernel as long as its stride never reaches over the border of a group of frames.
        self.down = nn.ModuleList(
            nn.Conv3d(inner, outer, kernel_size=stride, stride=stride)
            for inner, outer, stride in zip(
                config.widths[:-1], config.widths[1:], config.strides, strict=True
            )
        )
        self.norm = PositionNorm(config.widths[-1])
        self.head = nn.Conv3d(config.widths[-1], moments, 1)
        start_as_small_noise(self.linear, config.latent_channels)
        start_at_zero(self.head)

    def forward(self, video: Tensor, history: History) -> Tensor:
        """Moments of `video`."""
        x = self.stem(space_to_depth(video, self.patch))
        for level, stage in enumerate(self.stages):
            if level > 0:
                x = self.down[level - 1](x)
            x = stage(x, history)
        moments = self.head(F.silu(self.norm(x)))
        return moments + self.linear(space_to_depth(video, FACTORS))


class Decoder(nn.Module):
    """Latents `[b, C, f, h, w]` to video `[b, 3, t, H, W]`."""

    def __init__(self, config: CausalAutoencoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.strides = config.strides[::-1]
        widths = config.widths[::-1]
        self.linear = nn.Conv3d(config.latent_channels, 3 * prod(FACTORS), 1)
        self.stem = CausalConv3d(config.latent_channels, widths[0])
        self.stages = nn.ModuleList(
            Stage(width, blocks)
            for width, blocks in zip(widths, config.decoder_blocks[::-1], strict=True)
        )
        self.up = nn.ModuleList(
            nn.Conv3d(outer, inner * prod(stride), 1)
            for outer, inner, stride in zip(widths[:-1], widths[1:], self.strides, strict=True)
        )
        self.norm = PositionNorm(widths[-1])
        self.head = CausalConv3d(widths[-1], 3 * prod(config.patch))
        start_at_zero(self.head.conv)

    def forward(self, latents: Tensor, history: History) -> Tensor:
        """Video of `latents`."""
        x = self.stem(latents, history)
        for level, stage in enumerate(self.stages):
            if level > 0:
                x = depth_to_space(self.up[level - 1](x), self.strides[level - 1])
            x = stage(x, history)
        detail = self.head(F.silu(self.norm(x)), history)
        return depth_to_space(detail, self.patch) + depth_to_space(self.linear(latents), FACTORS)


class Stage(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))

    def forward(self, x: Tensor, history: History) -> Tensor:
        """`[b, c, t, h, w]` to the same shape."""
        for block in self.blocks:
            x = block(x, history)
        return x


class ResidualBlock(nn.Module):
    """Norm, SiLU and causal convolution, twice, added to the input; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = PositionNorm(width)
        self.conv1 = CausalConv3d(width, width)
        self.norm2 = PositionNorm(width)
        self.conv2 = CausalConv3d(width, width)
        start_at_zero(self.conv2.conv)

    def forward(self, x: Tensor, history: History) -> Tensor:
        """`[b, c, t, h, w]` to the same shape."""
        hidden = self.conv1(F.silu(self.norm1(x)), history)
        return x + self.conv2(F.silu(self.norm2(hidden)), history)


class CausalConv3d(nn.Module):
    """3x3x3 convolution that sees the present and the two frames before it."""

    kernel = 3

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        side = self.kernel // 2
        self.conv = nn.Conv3d(inner, outer, self.kernel, padding=(0, side, side))

    def forward(self, x: Tensor, history: History) -> Tensor:
        """`[b, inner, t, h, w]` to `[b, outer, t, h, w]`."""
        return self.conv(history.prepend(x, self.kernel - 1))


class PositionNorm(nn.Module):
    """Root-mean-square norm over the channels of each voxel of `[b, c, t, h, w]`, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        voxels = x.permute(0, 2, 3, 4, 1).float()
        normed = F.rms_norm(voxels, self.weight.shape, self.weight.float(), eps=1e-6)
        return normed.to(x.dtype).permute(0, 4, 1, 2, 3)


class History:
    """Hands each causal convolution, in running order, the frames that it saw last.

    At the start of a stream the past is the first frame, held: a still past, which the network
    meets in the middle of clips too, where black frames would be a cut.
    """

    def __init__(self, past: CausalState | None = None, keep: bool = False) -> None:
        self._past = None if past is None else iter(past)
        self._keep = keep
        self.kept: list[Tensor] = []

    def prepend(self, x: Tensor, frames: int) -> Tensor:
        """`x [b, c, t, h, w]` with its `frames` past frames before it."""
        # Repeated rather than expanded: the result has the memory layout that all parts share.
        past = [x[:, :, :1]] * frames if self._past is None else [next(self._past).to(x)]
        x = torch.cat([*past, x], dim=2)
        if self._keep:
            # A copy, since a view would hold the whole activation as long as the stream lives.
            self.kept.append(x[:, :, -frames:].clone())
        return x


def space_to_depth(x: Tensor, factors: Sequence[int]) -> Tensor:
    """`[b, c, t, h, w]` to `[b, c * pt * ph * pw, t / pt, h / ph, w / pw]`."""
    b, c, t, h, w = x.shape
    pt, ph, pw = factors
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, -1, t // pt, h // ph, w // pw)


def depth_to_space(x: Tensor, factors: Sequence[int]) -> Tensor:
    """The inverse of :func:`space_to_depth`; keeps the channels last in memory where they are."""
    b, _, t, h, w = x.shape
    pt, ph, pw = factors
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    x = x.reshape(b, -1, pt, ph, pw, t, h, w)
    if channels_last:
        x = x.permute(0, 5, 2, 6, 3, 7, 4, 1).reshape(b, t * pt, h * ph, w * pw, -1)
        return x.movedim(-1, 1)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, -1, t * pt, h * ph, w * pw)


def principal_components(vectors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[d]`, the `count` leading components `[count, d]` and their deviations `[count]`.

    Deviations are floored at a thousandth of the largest, so that a direction in which the
    samples hardly vary is not blown up to unit variance.
    """
    mean = vectors.mean(dim=0)
    centred = vectors - mean
    covariance = (centred.T @ centred / len(vectors)).double()
    values, columns = torch.linalg.eigh(covariance)
    values, columns = values.flip(0)[:count], columns.flip(1)[:, :count]
    # The sign of an eigenvector is arbitrary; fixed, a run is the same on every machine.
    signs = torch.sign(columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)))
    deviations = values.clamp(min=0).sqrt()
    deviations = deviations.clamp(min=1e-3 * deviations.max().item() + 1e-6)
    return mean, (columns * signs).T.to(vectors), deviations.to(vectors)


def start_at_zero(conv: nn.Conv3d) -> None:
    """Make `conv` add nothing until it is trained."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def start_as_small_noise(linear: nn.Conv3d, channels: int) -> None:
    """Start the log variance (rows from `channels` on) at a constant -6: a deviation of 5 %."""
    assert linear.bias is not None
    nn.init.zeros_(linear.weight[channels:])
    nn.init.constant_(linear.bias[channels:], -6.0)


def check_clip(frames: Tensor) -> None:
    """Raise :class:`UserError` unless `frames [b, t, 3, H, W]` divides by the factors."""
    t, _, height, width = frames.shape[1:]
    for name, size, factor in zip(
        ("frames", "height", "width"), (t, height, width), FACTORS, strict=True
    ):
        if size % factor or size == 0:
            raise UserError(
                f"clip {name} {size} is not a multiple of {factor}, which the causal autoencoder "
                f"needs; cut or resize the clip to {max(1, size // factor) * factor}"
            )


def unnamed_identity(config: CausalAutoencoderConfig) -> AutoencoderIdentity:
    """Identity of weights that were never saved: no source, latents taken as they are."""
    return AutoencoderIdentity(
        kind="causal",
        source="",
        sha256="",
        latent_channels=config.latent_channels,
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        first_frame_alone=False,
        scale=(1.0,) * config.latent_channels,
        shift=(0.0,) * config.latent_channels,
    )
