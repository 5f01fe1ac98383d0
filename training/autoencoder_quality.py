"""Loss and quality of an autoencoder's reconstructions, and the scale of its latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from streamdit.autoencoder.causal import FACTORS, CausalAutoencoder
from training.autoencoder_clips import Clips
from training.autoencoder_config import AutoencoderLossConfig, AutoencoderTrainConfig


def autoencoder_loss(
    video: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    weights: AutoencoderLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted loss, and its terms for the log.

    Args:
        video: `[b, t, 3, h, w]` in -1...1.
        reconstruction: what the decoder made of it, same shape.
        mean: posterior mean `[b, f, C, h', w']`.
        logvar: posterior log variance, same shape.
        weights: weight of each term.

    Returns:
        The loss, and detached `loss`, `l1`, `l2`, `gradient`, `temporal`, `kl` (unweighted) and
        `psnr` in decibels.
    """
    error = reconstruction.float() - video.float()
    mean, logvar = mean.float(), logvar.float()
    terms = {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "gradient": 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()),
        "temporal": error.diff(dim=1).abs().mean(),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean(),
    }
    loss = sum((getattr(weights, name) * term for name, term in terms.items()), error.new_zeros(()))
    logged = {name: term.detach() for name, term in terms.items()}
    return loss, {"loss": loss.detach(), **logged, "psnr": psnr_of(logged["l2"])}


def psnr_of(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels of a mean squared error of pixels in -1...1."""
    return 10.0 * torch.log10(4.0 / squared_error.clamp(min=1e-10))


@torch.no_grad()
def mean_psnr(model: CausalAutoencoder, clips: Clips, config: AutoencoderTrainConfig) -> float:
    """Mean over clips of the reconstruction's PSNR in decibels; whole clips at full size."""
    model.eval()
    values = []
    for video in whole_clips(model, clips, config.held_out_clips, config.seed):
        with mixed_precision(video.device):
            decoded, _ = model.decode(model.encode(video))
        error = (decoded.float().clamp(-1.0, 1.0) - video).square().mean()
        values.append(psnr_of(error).item())
    return float(np.mean(values))


@torch.no_grad()
def measure_statistics(
    model: CausalAutoencoder, clips: Clips, config: AutoencoderTrainConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale (1 / deviation) and shift (mean) of the latents over training clips."""
    model.eval()
    channels = model.config.latent_channels
    total = torch.zeros(channels, dtype=torch.float64, device=next(model.parameters()).device)
    squares, count = total.clone(), 0
    for video in whole_clips(model, clips, config.statistics_clips, config.seed):
        with mixed_precision(video.device):
            latents = model.encode(video)
        voxels = latents.double().transpose(0, 2).flatten(1)  # [C, f * h * w]
        total += voxels.sum(dim=1)
        squares += voxels.square().sum(dim=1)
        count += voxels.shape[1]
    shift = total / count
    deviation = (squares / count - shift.square()).clamp(min=1e-12).sqrt()
    if config.normalisation == "shared":
        deviation = deviation.square().mean().sqrt().expand_as(deviation)
    return tuple((1.0 / deviation).tolist()), tuple(shift.tolist())


def whole_clips(model: CausalAutoencoder, clips: Clips, count: int, seed: int) -> Iterator[Tensor]:
    """A fixed sample of clips, one by one, as `[1, t, 3, H, W]` on the model's device.

    Cut to the largest size that the autoencoder takes.
    """
    device = next(model.parameters()).device
    for clip in clips.sample(count, seed):
        t, h, w = (
            size // factor * factor for size, factor in zip(clip.shape[:3], FACTORS, strict=True)
        )
        yield to_video(torch.from_numpy(clip[None, :t, :h, :w]).to(device))


def to_video(frames: Tensor) -> Tensor:
    """`uint8 [b, t, h, w, 3]` to float32 `[b, t, 3, h, w]` in -1...1."""
    return frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, float32 on the CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
