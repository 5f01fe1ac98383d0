"""What a measurement of `streamdit bench` is about: the lines above its table."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jobs.bench_subject import RANDOM, DecodingSubject, most_text_tokens
from jobs.console import format_parameters
from jobs.model_facts import count_parameters
from streamdit.autoencoder.io import read_record
from streamdit.config import AutoencoderIdentity
from streamdit.loading import StreamingModel

if TYPE_CHECKING:
    from training.config import TrainConfig


def training_facts(config: TrainConfig, device: torch.device, preset: str) -> dict[str, Any]:
    """What is trained, how, and where."""
    bucket = config.model.buckets[0]
    return {
        "source": preset,
        "parameters": sum(count_parameters(config.model).values()),
        "dtype": config.precision,
        "latent": [bucket.frames, config.model.latent_channels, bucket.height, bucket.width],
        "batch": config.global_batch,
        "zero_stage": config.zero_stage,
        "text_tokens": sum(most_text_tokens(name) for name in config.model.text),
        **_place(device),
    }


def decoding_facts(subject: DecodingSubject, preset: str, model: str | None) -> dict[str, Any]:
    """What is decoded, by what, and where."""
    identity, device = subject.autoencoder.identity, subject.device
    _, height, width = subject.latent_shape
    return {
        "source": model or preset,
        "height": height * identity.spatial_factor,
        "width": width * identity.spatial_factor,
        "frames_per_chunk": subject.autoencoder.frames_for(subject.chunk_frames, first=False),
        "autoencoder": identity.kind,
        "autoencoder_parameters": sum(p.numel() for p in subject.autoencoder.parameters()),
        "autoencoder_trained": identity.source not in ("", RANDOM),
        "autoencoder_psnr": _psnr(identity),
        **_place(device),
    }


def _place(device: torch.device) -> dict[str, Any]:
    """Where it runs."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def stream_facts(subject: StreamingModel, preset: str, model: str | None) -> dict[str, Any]:
    """The same, and what denoises."""
    scheme = subject.scheme()
    return {
        **decoding_facts(decoding_of(subject), preset, model),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": str(subject.model.patch_embedding.weight.dtype).removeprefix("torch."),
        "scheme": {**vars(scheme), "guidance_scale": subject.config.sampling.guidance_scale},
        "text_tokens": subject.max_text_tokens,
    }


def decoding_of(subject: StreamingModel) -> DecodingSubject:
    """What decodes the chunks of a stream."""
    return DecodingSubject(
        subject.autoencoder, subject.latent_shape, subject.scheme().c, subject.device
    )


def _psnr(identity: AutoencoderIdentity) -> float | None:
    """Decibels that a trained autoencoder of ours reached on clips kept from training."""
    if identity.kind != "causal" or not identity.source:
        return None
    record = read_record(Path(identity.source))
    if record is None or record.training.get("psnr_split") != "held_out":
        return None
    return float(record.training["psnr"])


def headlines(facts: dict[str, Any]) -> list[str]:
    """The same for people, a line each."""
    device = facts["device"]
    if device == "CPU":
        threads = facts["threads"]
        device = f"{threads} thread{'' if threads == 1 else 's'} of a CPU ({facts['machine']})"
    cudnn = f", cuDNN {facts['cudnn']}" if facts["cudnn"] else ""
    lines = [f"device      {device}, PyTorch {facts['torch']}{cudnn}"]
    if "batch" in facts:
        shape = "×".join(map(str, facts["latent"]))
        training = f"batch of {facts['batch']}, ZeRO {facts['zero_stage']}, AdamW"
        lines.insert(0, f"step        latents {shape}, {training}")
    else:
        decoder = f"{format_parameters(facts['autoencoder_parameters'])} parameters"
        autoencoder = f"{facts['autoencoder']}, {decoder}, {_quality(facts)}"
        lines = [_video_line(facts), f"autoencoder {autoencoder}", *lines]
    if "parameters" in facts:
        lines.insert(
            0,
            f"model       {format_parameters(facts['parameters'])} parameters in {facts['dtype']}; "
            f"{facts['text_tokens']} text tokens",
        )
    return lines


def _video_line(facts: dict[str, Any]) -> str:
    size = f"{facts['height']}×{facts['width']}, {facts['frames_per_chunk']} frames a chunk"
    if (scheme := facts.get("scheme")) is None:
        return f"video       {size}"
    guidance = scheme["guidance_scale"]
    steering = "no guidance" if guidance == 1.0 else f"guidance {guidance:g}"
    parts = " ".join(f"{name}={scheme[name]}" for name in ("K", "N", "c", "s"))
    return f"video       {size}; {parts}, {steering}"


def _quality(facts: dict[str, Any]) -> str:
    """How well the decoder does its work, which its speed must be seen beside."""
    if facts["autoencoder_psnr"] is not None:
        return f"PSNR {facts['autoencoder_psnr']:.1f} dB"
    if facts["autoencoder_trained"]:
        return "PSNR on held-out clips not recorded"
    return "random weights, so no PSNR (give --model, or --autoencoder DIR, for one)"
