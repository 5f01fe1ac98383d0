"""Throughput and health of a run, measured between log lines."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from streamdit.config import DiTConfig
from streamdit.gpus import find_gpu
from streamdit.model.flops import count_flops, recomputed_flops
from training.data import Batch


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device`, or None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.bf16 if gpu is not None else None


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory used so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SampleCost(NamedTuple):
    """Latent tokens of a sample, operations of its forward pass, and of what is recomputed."""

    tokens: int
    flops: int
    recomputed: int


@dataclass
class StepMeter:
    """Collects step times and gives the figures of a log line.

    Attributes:
        model: shape of the transformer.
        world_size: number of devices.
        device: where it runs.
        peak: FLOP/s that utilisation is measured against; None leaves it out.
        recomputed: blocks that activation checkpointing runs once more.
    """

    model: DiTConfig
    world_size: int
    device: torch.device
    peak: float | None
    recomputed: int = 0
    _steps: list[float] = field(default_factory=list)
    _waits: list[float] = field(default_factory=list)
    _samples: int = 0
    _tokens: int = 0
    _forward_flops: float = 0.0
    _extra_flops: float = 0.0
    _recomputed_flops: float = 0.0
    _costs: dict[tuple[Any, ...], SampleCost] = field(default_factory=dict)

    def add(
        self,
        seconds: float,
        waited: float,
        batches: Sequence[Batch],
        extra_forwards: Sequence[int],
    ) -> None:
        """One step over `batches` took `seconds`, of which `waited` for data.

        `extra_forwards` counts, for each batch, forward passes of one sample beside the student's
        own, by models of the same shape.
        """
        self._steps.append(seconds)
        self._waits.append(waited)
        for batch, extra in zip(batches, extra_forwards, strict=True):
            samples, _, _, height, width = batch.latents.shape
            lengths = tuple((name, values.shape[1]) for name, (values, _) in batch.text.items())
            shape = (height, width, lengths)
            if shape not in self._costs:
                self._costs[shape] = sample_cost(
                    self.model, height, width, dict(lengths), self.recomputed
                )
            cost = self._costs[shape]
            self._samples += samples
            self._tokens += samples * cost.tokens
            self._forward_flops += samples * cost.flops
            self._extra_flops += extra * cost.flops
            self._recomputed_flops += samples * cost.recomputed

    def flush(self, steps_left: int) -> dict[str, float]:
        """Figures over the steps since the last flush."""
        steps = np.array(self._steps)
        seconds, mean = float(steps.sum()), float(steps.mean())
        figures = {
            "samples_per_s": self._samples * self.world_size / seconds,
            "tokens_per_s_per_device": self._tokens / seconds,
            "step_p50_s": float(np.percentile(steps, 50)),
            "step_p95_s": float(np.percentile(steps, 95)),
            "data_wait_share": sum(self._waits) / seconds,
            "peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
            "eta_s": mean * steps_left,
        }
        # Forward and backward are three forward passes; hardware also does what is recomputed.
        forward = self._forward_flops / seconds
        model_flops = 3 * forward + self._extra_flops / seconds
        figures["model_tflops_per_device"] = model_flops / 1e12
        if self.peak:
            figures["mfu"] = model_flops / self.peak
            figures["hfu"] = (model_flops + self._recomputed_flops / seconds) / self.peak
        self._steps.clear()
        self._waits.clear()
        self._samples = self._tokens = 0
        self._forward_flops = self._extra_flops = self._recomputed_flops = 0.0
        return figures


def sample_cost(
    model: DiTConfig, height: int, width: int, text_tokens: Mapping[str, int], recomputed: int = 0
) -> SampleCost:
    """Cost of one sample with so many `recomputed` blocks."""
    bucket = next(b for b in model.buckets if (b.height, b.width) == (height, width))
    frames, rows, columns = model.token_grid(bucket)
    parts = count_flops(model, bucket, text_tokens)
    again = recomputed_flops(model, parts, recomputed)
    return SampleCost(frames * rows * columns, parts["total"], again)


class MetricsFile:
    """One JSON object per line beside the run: readable while it runs, and after a lost server.

    Args:
        path: the file; an existing one is continued.
        resume_step: lines of later steps are dropped, since a resumed run makes them again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f"{path.name}.tmp")
        staging.write_text("".join(json.dumps(row) + "\n" for row in kept))
        staging.replace(path)
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append a line, visible to readers at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Complete lines of a metrics file; none if there is no file."""
    if not path.is_file():
        return
    with path.open() as lines:
        for line in lines.readlines():
            if line.endswith("\n"):
                yield json.loads(line)


def format_line(row: dict[str, Any], steps: int) -> str:
    """A log line for people."""
    parts = [f"step {row['step']:>6}/{steps}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "gradient_norm" in row:
        parts.append(f"grad norm {row['gradient_norm']:.3g}  lr {row['learning_rate']:.3g}")
    if "validation_loss" in row:
        parts.append(f"held-out {row['validation_loss']:.4f}")
    if "validation_videos" in row:
        parts.append(f"{row['validation_videos']:.0f} videos")
    if row.get("skipped_steps"):
        parts.append(f"{row['skipped_steps']} steps skipped")
    if "samples_per_s" in row:
        parts += [
            f"{row['samples_per_s']:.1f} samples/s",
            f"{row['tokens_per_s_per_device'] / 1e3:.1f}k tokens/s/device",
            f"{row['model_tflops_per_device']:.3g} TFLOP/s"
            + (f" (MFU {row['mfu']:.1%}, HFU {row['hfu']:.1%})" if "mfu" in row else ""),
            f"step p50 {row['step_p50_s'] * 1e3:.0f} ms p95 {row['step_p95_s'] * 1e3:.0f} ms",
            f"data wait {row['data_wait_share']:.0%}",
            f"{row['peak_memory_gib']:.1f} GiB",
            f"ETA {timedelta(seconds=int(row['eta_s']))}",
        ]
    return "  ".join(parts)
