"""What a model is and costs, as plain data: from a preset's plans or a model directory's record."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.config import available_presets, load_config
from streamdit.autoencoder import CausalAutoencoder, CausalAutoencoderConfig
from streamdit.config import (
    AutoencoderIdentity,
    BucketConfig,
    DiTConfig,
    PartitionConfig,
    SamplingConfig,
)
from streamdit.errors import UserError
from streamdit.gpus import Gpu
from streamdit.io import CONFIG_FILE, read_model_config, resolve_source
from streamdit.model import StreamDiT
from streamdit.model.flops import (
    PER_PROMPT,
    PER_SCHEDULE,
    count_flops,
    recomputed_flops,
    text_lengths,
)
from streamdit.model.memory import (
    BF16,
    FLOAT32,
    activation_bytes,
    fewest_recomputed,
    recomputed_blocks,
    streaming_bytes,
    training_memory,
)
from streamdit.partition import PartitionScheme
from streamdit.published import TEXT_ENCODERS, WAN_AUTOENCODERS, text_encoder_parameters

TEXT_TOKENS = 64
"""Tokens of a prompt from an encoder that has no known length."""

USABLE_SHARE = 0.9
"""Of a GPU's memory; the rest is for what is not counted, such as fragmentation and buckets of
gradients under way."""

KEPT_PARTS = ("blocks.modulation", "time_embedding", "shared_modulation", "text")
"""Parts whose weights a stream's step need not read: what they give is kept from step to step."""


@dataclass(frozen=True)
class AutoencoderFacts:
    """What is known of the autoencoder; `parameters` is None if its size is not."""

    kind: Literal["causal", "wan"] = "causal"
    temporal_factor: int = 4
    spatial_factor: int = 8
    first_frame_alone: bool = False
    parameters: int | None = None


@dataclass(frozen=True)
class RunFacts:
    """How the model is trained: devices, samples on each at once, and what saves memory."""

    world_size: int = 1
    micro_batch: int = 1
    zero_stage: int = 1
    activation_checkpointing: bool | int = False
    ema: bool = True
    offload_optimizer: bool = False


@dataclass(frozen=True)
class Subject:
    """What is described, whether trained already or only planned."""

    source: str
    model: DiTConfig
    partition: PartitionConfig
    sampling: SamplingConfig
    text_tokens: dict[str, int]
    autoencoder: AutoencoderFacts
    run: RunFacts = field(default_factory=RunFacts)
    fps: float | None = None


def find_subject(source: str, config: Path | None, overrides: list[str]) -> Subject:
    """The configuration that `source` names.

    Raises:
        UserError: if it is neither a preset nor a model directory, or does not validate.
    """
    if (Path(source) / CONFIG_FILE).is_file():
        if config or overrides:
            raise UserError(
                f"{source} is a trained model, whose settings are fixed: drop --config and "
                "KEY=VALUE, or describe a preset"
            )
        return _trained(source)
    presets = available_presets("train")
    if source not in presets:
        raise UserError(
            f"{source} is neither a training preset ({', '.join(presets) or 'none installed'}) nor "
            f"a model directory (it has no {CONFIG_FILE}): give one of these"
        )
    return _planned(source, config, overrides)


def _planned(preset: str, file: Path | None, overrides: list[str]) -> Subject:
    from training.config import TrainConfig

    plan = load_config(TrainConfig, stage="train", preset=preset, file=file, overrides=overrides)
    micro_batch, _ = plan.accumulation(plan.launch.workers)
    known = {name: TEXT_ENCODERS.get(name) for name in plan.model.text}
    return Subject(
        source=f"preset {preset}",
        model=plan.model,
        partition=plan.partition,
        sampling=plan.sampling,
        text_tokens={
            name: encoder.config.max_tokens if encoder else TEXT_TOKENS
            for name, encoder in known.items()
        },
        autoencoder=_planned_autoencoder(plan.autoencoder, preset, plan.model.latent_channels),
        run=RunFacts(
            plan.launch.workers,
            micro_batch,
            plan.zero_stage,
            plan.activation_checkpointing,
            plan.ema_decay > 0,
            plan.offload_optimizer,
        ),
    )


def _planned_autoencoder(kind: str | None, preset: str, channels: int) -> AutoencoderFacts:
    """The autoencoder that a preset's latents will come from, unless it is told otherwise."""
    if kind == "wan":
        return AutoencoderFacts(
            kind="wan", first_frame_alone=True, parameters=WAN_AUTOENCODERS.get(channels)
        )
    from training.autoencoder_config import AutoencoderTrainConfig

    own = preset if preset in available_presets("autoencoder") else "small"
    plan = load_config(AutoencoderTrainConfig, stage="autoencoder", preset=own)
    shape = plan.model.model_copy(update={"latent_channels": channels})
    return AutoencoderFacts(parameters=_causal_parameters(shape))


def _trained(directory: str) -> Subject:
    config = read_model_config(directory)
    identity = config.autoencoder
    return Subject(
        source=directory,
        model=config.model,
        partition=config.partition,
        sampling=config.sampling,
        text_tokens={encoder.name: encoder.max_tokens for encoder in config.text_encoders},
        autoencoder=AutoencoderFacts(
            kind=identity.kind,
            temporal_factor=identity.temporal_factor,
            spatial_factor=identity.spatial_factor,
            first_frame_alone=identity.first_frame_alone,
            parameters=_trained_autoencoder(identity, Path(directory)),
        ),
        fps=config.fps,
    )


def _trained_autoencoder(identity: AutoencoderIdentity, directory: Path) -> int | None:
    """Parameters of a model directory's autoencoder, as far as they can be told from its record."""
    from streamdit.autoencoder.io import read_record

    if identity.kind == "wan":
        return WAN_AUTOENCODERS.get(identity.latent_channels)
    record = read_record(resolve_source(identity.source, directory))
    return _causal_parameters(record.model) if record is not None else None


def _causal_parameters(shape: CausalAutoencoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CausalAutoencoder(shape).parameters())


def describe(subject: Subject, gpu: Gpu) -> dict[str, Any]:
    """All facts as plain data; sizes in bytes, cost in floating-point operations, times in s."""
    parts = count_parameters(subject.model)
    total = sum(parts.values())
    lengths = text_lengths(subject.model, subject.text_tokens)
    facts = {
        "source": subject.source,
        "parameters": total,
        "parameters_by_part": parts,
        "weights_bytes": {"bfloat16": BF16 * total, "float32": FLOAT32 * total},
        "buckets": [_describe_bucket(subject, bucket) for bucket in subject.model.buckets],
        "text_encoders": dict(subject.model.text),
        "text_tokens": sum(lengths.values()),
        "fps": subject.fps,
        "partition": _describe_mix(subject),
        "gamma": subject.partition.gamma.model_dump(),
        "sampling": _describe_sampling(subject),
        "memory": {
            "inference": _inference_memory(subject, total, sum(lengths.values())),
            "training": _training_memory(subject, total, sum(lengths.values()), gpu),
        },
    }
    return facts | {"floor": _floor(subject, facts, gpu)}


def count_parameters(config: DiTConfig) -> dict[str, int]:
    """Parameters of each part, the blocks' parts summed over all blocks; nothing is allocated."""
    with torch.device("meta"):
        model = StreamDiT(config)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        path = name.split(".")
        # blocks.<index>.<part>.… counts as blocks.<part>
        parts[f"blocks.{path[2]}" if path[0] == "blocks" else path[0]] += parameter.numel()
    return dict(parts)


def _describe_bucket(subject: Subject, bucket: BucketConfig) -> dict[str, Any]:
    autoencoder = subject.autoencoder
    frames = bucket.frames * autoencoder.temporal_factor
    if autoencoder.first_frame_alone:
        frames -= autoencoder.temporal_factor - 1
    flops = count_flops(subject.model, bucket, subject.text_tokens)
    return {
        "latent": [bucket.frames, subject.model.latent_channels, bucket.height, bucket.width],
        "video": [
            frames,
            bucket.height * autoencoder.spatial_factor,
            bucket.width * autoencoder.spatial_factor,
        ],
        "tokens": list(subject.model.token_grid(bucket)),
        "window": list(bucket.window),
        "flops_per_forward": flops["total"],
        "flops_by_part": {name: count for name, count in flops.items() if name != "total"},
    }


def _describe_mix(subject: Subject) -> list[dict[str, Any]]:
    total = sum(entry.weight for entry in subject.partition.entries)
    mix = []
    for entry in subject.partition.entries:
        scheme = PartitionScheme.for_buffer(
            subject.model.buffer_frames,
            entry.chunk_frames,
            reference_frames=entry.reference_frames,
        )
        share = entry.weight / total
        mix.append({"K": scheme.K, "N": scheme.N, "c": scheme.c, "share": share})
    return mix


def _describe_sampling(subject: Subject) -> dict[str, Any]:
    scheme = PartitionScheme.from_sampling(subject.model.buffer_frames, subject.sampling)
    per_step = 1 if subject.sampling.guidance_scale == 1.0 else 2
    return {
        "K": scheme.K,
        "N": scheme.N,
        "c": scheme.c,
        "s": scheme.s,
        "guidance_scale": subject.sampling.guidance_scale,
        "steps_per_frame": scheme.total_steps,
        "evaluations_per_step": per_step,
        "evaluations_per_chunk": scheme.s * per_step,
        "video_frames_per_chunk": scheme.c * subject.autoencoder.temporal_factor,
    }


def _inference_memory(subject: Subject, parameters: int, text_tokens: int) -> dict[str, Any]:
    """Memory of one stream on a GPU; text encoders in bf16, the autoencoder in float32."""
    guided = 1 if subject.sampling.guidance_scale == 1.0 else 2
    bucket = subject.model.buckets[0]
    text, working = streaming_bytes(subject.model, bucket, text_tokens, guided)
    encoders = {
        name: None if size is None else BF16 * size
        for name, size in (
            (name, text_encoder_parameters(name, width))
            for name, width in subject.model.text.items()
        )
    }
    size = subject.autoencoder.parameters
    autoencoder = None if size is None else FLOAT32 * size
    known = [BF16 * parameters, text, working, *encoders.values(), autoencoder]
    return {
        "model": BF16 * parameters,
        "text_encoders": encoders,
        "autoencoder": autoencoder,
        "text_keys_values": text,
        "largest_block": working,
        "total": sum(part for part in known if part is not None),
    }


def _training_memory(
    subject: Subject, parameters: int, text_tokens: int, gpu: Gpu
) -> dict[str, Any]:
    """Memory of one device at every ZeRO stage, and how many blocks to recompute on `gpu`."""
    run, model = subject.run, subject.model
    bucket = max(model.buckets, key=lambda b: b.frames * b.height * b.width)
    shape = (model, bucket, text_tokens, run.micro_batch)
    recomputed = recomputed_blocks(run.activation_checkpointing, model.depth)
    kept = activation_bytes(*shape, recomputed)
    stages, fewest = {}, {}
    for stage in (1, 2, 3):
        memory = training_memory(
            parameters, stage, run.world_size, kept, run.ema, run.offload_optimizer
        )
        stages[str(stage)] = asdict(memory) | {"total": memory.total}
        room = USABLE_SHARE * gpu.memory - memory.state
        fits = memory.step <= room
        fewest[str(stage)] = fewest_recomputed(*shape, room) if fits else None
    return {
        "world_size": run.world_size,
        "micro_batch": run.micro_batch,
        "zero_stage": run.zero_stage,
        "offload_optimizer": run.offload_optimizer,
        "recomputed_blocks": recomputed,
        "activations": {
            "kept": activation_bytes(*shape),
            "recomputed": activation_bytes(*shape, model.depth),
        },
        "fewest_recomputed": fewest,
        "stages": stages,
    }


def _floor(subject: Subject, facts: dict[str, Any], gpu: Gpu) -> dict[str, Any]:
    """Least times on a GPU: every operation at its peak rate, every weight read once.

    As configured, and after distillation, which leaves one evaluation per chunk.
    """
    bucket, sampling = facts["buckets"][0], facts["sampling"]
    kept = sum(bucket["flops_by_part"][part] for part in (*PER_PROMPT, *PER_SCHEDULE))
    weights = facts["parameters"] - sum(
        facts["parameters_by_part"].get(part, 0) for part in KEPT_PARTS
    )
    bandwidth = BF16 * weights / gpu.bandwidth
    floors = {}
    for name, evaluations, steps in (
        ("configured", sampling["evaluations_per_step"], sampling["s"]),
        ("distilled", 1, 1),
    ):
        flops = evaluations * (bucket["flops_per_forward"] - kept)
        step = max(flops / gpu.bf16, bandwidth)
        floors[name] = {
            "flops": flops,
            "compute": flops / gpu.bf16,
            "bandwidth": bandwidth,
            "step": step,
            "step_fp8": None if gpu.fp8 is None else max(flops / gpu.fp8, bandwidth / 2),
            "frames_per_second": sampling["video_frames_per_chunk"] / (steps * step),
        }
    run, depth = subject.run, subject.model.depth
    recomputed = recomputed_flops(
        subject.model,
        bucket["flops_by_part"],
        recomputed_blocks(run.activation_checkpointing, depth),
    )
    training = 3 * bucket["flops_per_forward"] + recomputed
    return {
        "gpu": gpu.title,
        "rates": f"bf16 {gpu.bf16 / 1e12:g} TFLOP/s, {gpu.bandwidth / 1e12:g} TB/s",
        "rates_source": gpu.source,
        "gpu_memory": gpu.memory,
        **floors,
        "training_micro_batch": run.micro_batch * training / gpu.bf16,
    }
