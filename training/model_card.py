"""The model card: what a registered model is, where it comes from and how to stream from it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from streamdit.config import StreamDiTConfig
from streamdit.partition import PartitionScheme

SAMPLE_FILE = "sample.mp4"
CARD_FILE = "README.md"


def model_card(
    name: str,
    config: StreamDiTConfig,
    tags: Mapping[str, str],
    scores: Mapping[str, float],
    sample_prompt: str | None,
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        name: registered model.
        config: of the model directory.
        tags: of the version, without scores.
        scores: by metric.
        sample_prompt: prompt of the sample video beside the card; None: there is none.
    """
    parts = [_front_matter(name), f"# {name}", _summary(config)]
    if sample_prompt is not None:
        parts.append(
            f'<video src="{SAMPLE_FILE}" controls muted loop></video>\n\n'
            f"[{SAMPLE_FILE}]({SAMPLE_FILE}): “{sample_prompt}”"
        )
    parts += ["## Stream from it", _usage(name)]
    parts += ["## What it serves", _table(("", ""), _facts(config))]
    if scores:
        rows = [(metric, f"{value:.6g}") for metric, value in scores.items()]
        parts += ["## Scores", _table(("metric", "value"), rows)]
    parts += ["## Where it comes from", _table(("", ""), sorted(tags.items()))]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str) -> str:
    return "\n".join(
        [
            "---",
            "library_name: streamdit",
            "pipeline_tag: text-to-video",
            "tags: [text-to-video, streaming, streamdit]",
            f"model_name: {json.dumps(name)}",
            "---",
        ]
    )


def _summary(config: StreamDiTConfig) -> str:
    kind = "StreamDiT (arXiv:2507.03745) streams video from text without end"
    if config.distilled is None:
        return f"{kind}; this one takes any number of denoising steps and guidance."
    record = config.distilled
    return (
        f"{kind}. This one is distilled: one evaluation per chunk, without guidance, does what "
        f"{record.teacher_micro_steps} steps with guidance {record.teacher_guidance_scale:g} did."
    )


def _usage(name: str) -> str:
    return "\n".join(
        [
            "```python",
            "import streamdit  # with MLFLOW_TRACKING_URI naming the store",
            "",
            f'stream = streamdit.load("models:/{name}@ALIAS").stream("what to show", seed=0)',
            "for chunk in stream:  # uint8 frames [n, H, W, 3]",
            "    ...",
            "```",
        ]
    )


def _facts(config: StreamDiTConfig) -> list[tuple[str, str]]:
    bucket, identity = config.model.buckets[0], config.autoencoder
    scheme = PartitionScheme.from_sampling(config.model.buffer_frames, config.sampling)
    size = f"{bucket.width * identity.spatial_factor}x{bucket.height * identity.spatial_factor}"
    guided = 1 if config.sampling.guidance_scale == 1.0 else 2
    if config.distilled is not None:
        served = [(s.reference_frames, s.chunk_frames) for s in config.distilled.schemes]
    else:
        served = [(e.reference_frames, e.chunk_frames) for e in config.partition.entries]
    return [
        ("video", f"{size} at {config.fps:g} FPS"),
        ("buffer", f"{scheme.buffer_frames} latent frames"),
        ("default scheme", f"K={scheme.K} N={scheme.N} c={scheme.c} s={scheme.s}"),
        ("evaluations per chunk", str(scheme.s * guided)),
        ("schemes", ", ".join(f"K={K} c={c}" for K, c in served)),
        ("autoencoder", f"{identity.kind}, {identity.latent_channels} channels"),
        ("text encoders", ", ".join(encoder.name for encoder in config.text_encoders)),
    ]


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows)])
