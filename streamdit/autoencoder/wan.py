"""Wan's video VAE, as diffusers has it, behind the contract of :class:`Autoencoder`.

Clips have 1 + 4k frames: the first latent frame stands for one video frame. diffusers keeps the
features that causal convolutions need from earlier frames on the module, so there two streams
would mix. Here the stream owns them: encoder and decoder are driven with a cache that is passed
in and handed back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamdit.autoencoder.base import Autoencoder
from streamdit.config import AutoencoderIdentity
from streamdit.errors import UserError

WAN_CLASS = "AutoencoderKLWan"
TEMPORAL_FACTOR = 4

WanState = tuple[Any, ...]
"""diffusers' feature cache: per convolution a tensor, None, or the mark "Rep"."""


class WanAutoencoder(Autoencoder):
    """A diffusers `AutoencoderKLWan` (Wan 2.1, or Wan 2.2 with its residual blocks and patches).

    Args:
        vae: the `AutoencoderKLWan`; its tiling and slicing switches have no effect here.
        source: directory or hub id that it came from.
        sha256: hash of its weights.
    """

    def __init__(self, vae: Any, source: str, sha256: str) -> None:
        super().__init__()
        self.vae = vae
        self.patch = vae.config.patch_size or 1
        check_supported(vae, source)
        self.identity = AutoencoderIdentity(
            kind="wan",
            source=source,
            sha256=sha256,
            latent_channels=vae.config.z_dim,
            temporal_factor=TEMPORAL_FACTOR,
            spatial_factor=spatial_factor(vae),
            first_frame_alone=True,
            scale=tuple(1.0 / deviation for deviation in vae.config.latents_std),
            shift=tuple(vae.config.latents_mean),
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Encode a clip of 1 + 4k frames; see :meth:`Autoencoder.encode`.

        Args:
            frames: `[b, 1 + 4k, 3, H, W]` floating in -1...1.

        Returns:
            The posterior mean `[b, 1 + k, C, h, w]`, raw, in the dtype of `frames`.

        Raises:
            UserError: if the clip's length or size does not fit.
        """
        return self.encode_next(frames)[0]

    def encode_next(self, frames: Tensor, state: WanState | None = None) -> tuple[Tensor, WanState]:
        """Encode the next frames of a long clip; see :meth:`Autoencoder.encode_next`.

        The first frame of a clip makes a latent frame, then every four.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        alone = 1 if state is None else 0
        self._check_clip(frames, alone)
        video = frames.transpose(1, 2).to(self.vae.dtype)  # [b, 3, t, H, W]
        if self.patch > 1:
            video = patchify(video, patch_size=self.patch)
        # As in decoding, entries are replaced and never written into.
        cache = [None] * causal_convolutions(self.vae.encoder) if state is None else list(state)
        groups = [video[:, :, :alone], *video[:, :, alone:].split(TEMPORAL_FACTOR, dim=2)]
        features = [
            self.vae.encoder(group, feat_cache=cache, feat_idx=[0])
            for group in groups
            if group.shape[2] > 0
        ]
        moments = self.vae.quant_conv(torch.cat(features, dim=2))
        mean = moments.chunk(2, dim=1)[0]
        return mean.transpose(1, 2).to(frames.dtype), tuple(cache)

    def decode(self, latents: Tensor, state: WanState | None = None) -> tuple[Tensor, WanState]:
        """Decode the next latents of a stream; see :meth:`Autoencoder.decode`.

        The first latent frame of a stream gives one video frame, every later one four. Frames are
        clamped to -1...1 like diffusers' own.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        features = self.vae.post_quant_conv(latents.transpose(1, 2).to(self.vae.dtype))
        # The decoder replaces entries of the list and never writes into a tensor of it, so a
        # shallow copy leaves the caller's state as it was.
        cache = list(state) if state is not None else None
        first = cache is None
        if cache is None:
            cache = [None] * causal_convolutions(self.vae.decoder)
        pictures = []
        for index, feature in enumerate(features.split(1, dim=2)):
            pictures.append(
                self.vae.decoder(
                    feature, feat_cache=cache, feat_idx=[0], first_chunk=first and index == 0
                )
            )
        video = torch.cat(pictures, dim=2)
        if self.patch > 1:
            video = unpatchify(video, patch_size=self.patch)
        return video.clamp(-1.0, 1.0).transpose(1, 2).to(latents.dtype), tuple(cache)

    def _check_clip(self, frames: Tensor, alone: int) -> None:
        """Refuse a clip that is not `alone` + 4k frames, or of a size that does not divide."""
        t, _, height, width = frames.shape[1:]
        if t % TEMPORAL_FACTOR != alone or t == 0:
            groups = max(0, t - alone) // TEMPORAL_FACTOR
            raise UserError(
                f"clip frames {t} do not fit the wan autoencoder, which takes "
                f"{'1 + 4k' if alone else '4k behind the first'}; cut the clip to "
                f"{max(1 - alone, groups) * TEMPORAL_FACTOR + alone} frames"
            )
        factor = self.identity.spatial_factor
        if height % factor or width % factor:
            raise UserError(
                f"clip size {height}x{width} is not a multiple of {factor}, which the wan "
                "autoencoder needs; resize the clip"
            )


def load_wan(source: str | Path) -> WanAutoencoder:
    """Load a Wan VAE from a diffusers directory or hub id.

    Args:
        source: directory of the VAE, directory of a pipeline with a `vae` folder, or hub id of
            either.

    Raises:
        UserError: if there is none, or it is another kind of autoencoder.
    """
    from diffusers import AutoencoderKLWan

    folder, subfolder = Path(source), None
    if folder.is_dir():
        # The VAE's own folder, since model directories keep a copy of what is named here.
        folder = folder if (folder / "config.json").is_file() else folder / "vae"
        check_class(folder, source)
        source = folder
    else:
        subfolder = hub_subfolder(str(source))
    try:
        vae = AutoencoderKLWan.from_pretrained(
            str(source), subfolder=subfolder, torch_dtype=torch.float32
        )
    except OSError as error:
        raise UserError(
            f"autoencoder {source} could not be loaded ({first_line(error)}); check the name, or "
            "download it and give its directory"
        ) from None
    return WanAutoencoder(vae, str(source), weights_sha256(vae))


def check_class(folder: Path, source: str | Path) -> None:
    """Refuse a directory whose configuration is not a Wan VAE's."""
    import json

    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"autoencoder {source} has no config.json; name a directory written by "
            f"`streamdit train-autoencoder`, or one of diffusers' {WAN_CLASS}"
        )
    found = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    if found != WAN_CLASS:
        raise UserError(
            f"autoencoder {source} is of class {found}; supported are this project's own and "
            f"diffusers' {WAN_CLASS}"
        )


def hub_subfolder(hub_id: str) -> str | None:
    """`vae` if the hub repository is a whole pipeline, None if it is the VAE itself."""
    from diffusers import AutoencoderKLWan

    try:
        config = AutoencoderKLWan.load_config(hub_id)
    except OSError:
        return "vae"
    return None if config.get("_class_name") == WAN_CLASS else "vae"


def check_supported(vae: Any, source: str) -> None:
    """Refuse configurations that this wrapper would get wrong."""
    config = vae.config
    channels = 3 * (config.patch_size or 1) ** 2
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise UserError(
            f"autoencoder {source} takes {config.in_channels} channels and gives "
            f"{config.out_channels}, RGB in patches of {config.patch_size or 1} has {channels}; "
            "use a VAE of RGB video"
        )
    if sum(config.temperal_downsample) != 2:
        raise UserError(
            f"autoencoder {source} has temperal_downsample {list(config.temperal_downsample)}; "
            "diffusers encodes groups of 4 frames, so use a VAE with two temporal halvings"
        )
    if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
        raise UserError(
            f"autoencoder {source} has {len(config.latents_mean)} latents_mean and "
            f"{len(config.latents_std)} latents_std for {config.z_dim} channels; mend its "
            "config.json"
        )


def spatial_factor(vae: Any) -> int:
    """Pixels per latent row: one halving between two stages, times the patch."""
    return 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)


def causal_convolutions(network: nn.Module) -> int:
    """Length of diffusers' feature cache for `network`."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(module, WanCausalConv3d) for module in network.modules())


def weights_sha256(module: nn.Module) -> str:
    """Hash of the names, shapes and float32 values of all weights.

    The files that hold them may be sharded, or lie in a cache, so what they say is hashed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
