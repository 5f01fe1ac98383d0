"""What is benchmarked: a model directory, or a preset with random weights."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

import streamdit
from jobs.config import available_presets, load_config
from streamdit.autoencoder.base import Autoencoder
from streamdit.autoencoder.causal import CausalAutoencoder, CausalAutoencoderConfig
from streamdit.config import SamplingConfig, StreamDiTConfig, TextEncoderConfig
from streamdit.errors import UserError
from streamdit.io import StreamingModel
from streamdit.model import StreamDiT
from streamdit.text import build_text_encoders

WAN = "wan"
"""Name of diffusers' Wan VAE among the autoencoders."""

WORDS = "abcdefghijklmnopqrstuvwxyz"


class AutoencoderShape(BaseModel):
    """What counts here of an autoencoder preset, whose other keys say how to train it."""

    model_config = ConfigDict(extra="ignore")

    model: CausalAutoencoderConfig


def load_subject(directory: str, device: torch.device, dtype: torch.dtype) -> StreamingModel:
    """A trained model, as it streams."""
    return streamdit.load(directory, device=device, dtype=dtype)


def random_subject(
    preset: str,
    autoencoder: str | None,
    text_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> StreamingModel:
    """A training preset with random weights, streaming as after distillation: s = 1, w = 1.

    Args:
        preset: name of a training preset.
        autoencoder: preset of an autoencoder, or `wan`; default: what the preset asks for, or that
            of the same name, or the default one.
        text_tokens: tokens of a prompt, per text encoder.
        device: where it runs.
        dtype: precision of the transformer.

    Raises:
        UserError: if there is no such preset.
    """
    from training.config import TrainConfig

    plan = load_config(TrainConfig, stage="train", preset=preset)
    asked = WAN if plan.autoencoder == "wan" else default_autoencoder(preset)
    decoder = random_autoencoder(autoencoder or asked, plan.model.latent_channels, device)
    encoders = tuple(
        TextEncoderConfig(name=name, kind="bytes", width=width, max_tokens=text_tokens)
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


def default_autoencoder(preset: str) -> str:
    """The autoencoder preset that goes with a training preset."""
    return preset if preset in available_presets("autoencoder") else "default"


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
    return WanAutoencoder(vae, source="random", sha256="")


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
