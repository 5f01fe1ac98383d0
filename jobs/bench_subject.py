"""What is benchmarked: a model directory, or a preset with random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

import streamdit
from jobs.config import available_presets, load_config
from jobs.model_facts import TEXT_TOKENS
from streamdit.autoencoder import load_autoencoder
from streamdit.autoencoder.base import Autoencoder
from streamdit.autoencoder.causal import CausalAutoencoder, CausalAutoencoderConfig
from streamdit.config import DiTConfig, SamplingConfig, StreamDiTConfig, TextEncoderConfig
from streamdit.errors import UserError
from streamdit.io import read_model_config, resolve_source
from streamdit.loading import StreamingModel, check_autoencoder
from streamdit.model import StreamDiT
from streamdit.published import TEXT_ENCODERS
from streamdit.registered import download
from streamdit.text import build_text_encoders

if TYPE_CHECKING:
    from training.config import TrainConfig

WAN = "wan"
"""Name of diffusers' Wan VAE among the autoencoders."""

RANDOM = "random"
"""Source of an autoencoder of diffusers' that was loaded from nowhere."""

WORDS = "abcdefghijklmnopqrstuvwxyz"


class AutoencoderShape(BaseModel):
    """What counts here of an autoencoder preset, whose other keys say how to train it."""

    model_config = ConfigDict(extra="ignore")

    model: CausalAutoencoderConfig


@dataclass(frozen=True)
class DecodingSubject:
    """An autoencoder and the latents that a stream hands it.

    Attributes:
        autoencoder: what decodes.
        latent_shape: `(C, h, w)` of a latent frame.
        chunk_frames: latent frames of a chunk.
        device: where it runs.
    """

    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    chunk_frames: int
    device: torch.device


def load_subject(directory: str, device: torch.device, dtype: torch.dtype) -> StreamingModel:
    """A trained model, as it streams."""
    return streamdit.load(directory, device=device, dtype=dtype)


def random_subject(
    preset: str,
    autoencoder: str | None,
    text_tokens: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> StreamingModel:
    """A training preset with random weights, streaming as after distillation: s = 1, w = 1.

    Args:
        preset: name of a training preset.
        autoencoder: preset of an autoencoder, `wan`, or the directory of a trained one; default:
            what the preset asks for, or that of the same name, or the default one.
        text_tokens: tokens of a prompt, per text encoder; default: the most that each gives.
        device: where it runs.
        dtype: precision of the transformer.

    Raises:
        UserError: if there is no such preset.
    """
    plan = _plan(preset)
    decoder = _preset_decoder(plan, preset, autoencoder, device)
    encoders = tuple(
        TextEncoderConfig(
            name=name, kind="bytes", width=width, max_tokens=text_tokens or most_text_tokens(name)
        )
        for name, width in plan.model.text.items()
    )
    config = StreamDiTConfig(
        model=plan.model,
        partition=plan.partition,
        sampling=SamplingConfig(chunk_frames=plan.sampling.chunk_frames, micro_steps=1),
        autoencoder=decoder.identity,
        text_encoders=encoders,
        fps=16.0,
    )
    with torch.device(device):
        model = StreamDiT(plan.model)
    randomise(model, device)
    return StreamingModel(
        config, model.to(dtype).eval(), decoder, build_text_encoders(encoders, device), device
    )


def most_text_tokens(encoder: str) -> int:
    """Tokens that a prompt may have from the text encoder of this name."""
    known = TEXT_ENCODERS.get(encoder)
    return known.config.max_tokens if known is not None else TEXT_TOKENS


def full_attention(subject: StreamingModel) -> StreamingModel | None:
    """The same weights with a window as large as the grid; None if it already is."""
    shape = subject.config.model
    bucket = shape.buckets[0]
    grid = shape.token_grid(bucket)
    if tuple(bucket.window) == grid:
        return None
    whole = bucket.model_copy(update={"window": grid})
    shape = shape.model_copy(update={"buckets": (whole, *shape.buckets[1:])})
    with torch.device("meta"):
        model = StreamDiT(shape)
    model.load_state_dict(subject.model.state_dict(), assign=True)
    config = subject.config.model_copy(update={"model": shape})
    return replace(subject, config=config, model=model.eval())


def load_decoding(directory: str, device: torch.device) -> DecodingSubject:
    """The autoencoder of a model directory, without the rest."""
    folder = download(directory) if directory.startswith("models:/") else Path(directory)
    config = read_model_config(folder)
    autoencoder = load_autoencoder(resolve_source(config.autoencoder.source, folder), device)
    check_autoencoder(autoencoder.identity, config.autoencoder)
    return _decoding(autoencoder, config.model, config.sampling.chunk_frames, device)


def preset_decoding(preset: str, autoencoder: str | None, device: torch.device) -> DecodingSubject:
    """The autoencoder of a training preset; see :func:`random_subject`."""
    plan = _plan(preset)
    decoder = _preset_decoder(plan, preset, autoencoder, device)
    return _decoding(decoder, plan.model, plan.sampling.chunk_frames, device)


def _decoding(
    autoencoder: Autoencoder, model: DiTConfig, chunk_frames: int, device: torch.device
) -> DecodingSubject:
    bucket = model.buckets[0]
    shape = model.latent_channels, bucket.height, bucket.width
    return DecodingSubject(autoencoder, shape, chunk_frames, device)


def _plan(preset: str) -> TrainConfig:
    from training.config import TrainConfig

    return load_config(TrainConfig, stage="train", preset=preset)


def _preset_decoder(
    plan: TrainConfig, preset: str, autoencoder: str | None, device: torch.device
) -> Autoencoder:
    channels = plan.model.latent_channels
    if autoencoder is not None and is_directory_of_autoencoder(autoencoder):
        trained = load_autoencoder(autoencoder, device)
        if trained.identity.latent_channels != channels:
            raise UserError(
                f"{autoencoder} makes latents of {trained.identity.latent_channels} channels but "
                f"preset {preset} takes {channels}; choose another of the two"
            )
        return trained.eval()
    asked = WAN if plan.autoencoder == "wan" else default_autoencoder(preset)
    return random_autoencoder(autoencoder or asked, channels, device)


def is_directory_of_autoencoder(name: str) -> bool:
    """Whether `name` means a directory: names of presets come first."""
    return name not in (*available_presets("autoencoder"), WAN) and Path(name).is_dir()


def default_autoencoder(preset: str) -> str:
    """The autoencoder preset that goes with a training preset."""
    return preset if preset in available_presets("autoencoder") else "small"


def random_autoencoder(name: str, latent_channels: int, device: torch.device) -> Autoencoder:
    """An autoencoder with random weights.

    Raises:
        UserError: if there is none of that name, or its latents do not fit the model.
    """
    if name == WAN:
        return random_wan(latent_channels).to(device).eval()
    known = available_presets("autoencoder")
    if name not in known:
        raise UserError(
            f"there is no autoencoder preset {name}; choose one of {', '.join([*known, WAN])}"
        )
    plan = load_config(AutoencoderShape, stage="autoencoder", preset=name)
    shape = plan.model.model_copy(update={"latent_channels": latent_channels})
    autoencoder = CausalAutoencoder(shape)
    randomise(autoencoder, torch.device("cpu"))
    return autoencoder.to(device).eval()


def random_wan(latent_channels: int) -> Autoencoder:
    """Wan 2.1's VAE in its real size, with random weights."""
    from diffusers import AutoencoderKLWan

    from streamdit.autoencoder.wan import WanAutoencoder

    vae = AutoencoderKLWan()
    if vae.config.z_dim != latent_channels:
        raise UserError(
            f"Wan's VAE has {vae.config.z_dim} latent channels but the model {latent_channels}; "
            "choose another preset or another autoencoder"
        )
    return WanAutoencoder(vae, source=RANDOM, sha256="")


@torch.no_grad()
def randomise(model: torch.nn.Module, device: torch.device) -> None:
    """Draw every matrix anew, so that no gate is zero and no layer is skipped by chance."""
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5, generator=generator)


def prompt_of(tokens: int) -> str:
    """A prompt that every `bytes` encoder turns into `tokens` tokens, its begin token included."""
    return " ".join(WORDS[number % len(WORDS)] for number in range(tokens - 1))
