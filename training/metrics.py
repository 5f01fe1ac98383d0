"""Throughput and health of a run, measured between log lines."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamdit.gpus import find_gpu


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


@dataclass
class StepMeter:
    """Collects step times and gives the figures of a log line.

    Attributes:
        forward_flops: floating-point operations of one sample's forward pass.
        tokens: latent tokens of one sample.
        samples: samples of a step on this device.
        world_size: number of devices.
        device: where it runs.
        recompute: one more forward pass for activation checkpointing.

    A teacher's forward passes in distillation are not counted.
    """

    forward_flops: float
    tokens: int
    samples: int
    world_size: int
    device: torch.device
    recompute: bool
    _steps: list[float] = field(default_factory=list)
    _waits: list[float] = field(default_factory=list)

    def add(self, seconds: float, waited: float) -> None:
        """One step took `seconds`, of which `waited` for data."""
        self._steps.append(seconds)
        self._waits.append(waited)

    def flush(self, steps_left: int) -> dict[str, float]:
        """Figures over the steps since the last flush."""
        steps = np.array(self._steps)
        mean = float(steps.mean())
        figures = {
            "samples_per_s": self.samples * self.world_size / mean,
            "tokens_per_s_per_device": self.samples * self.tokens / mean,
            "step_p50_s": float(np.percentile(steps, 50)),
            "step_p95_s": float(np.percentile(steps, 95)),
            "data_wait_share": sum(self._waits) / float(steps.sum()),
            "peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
            "eta_s": mean * steps_left,
        }
        # Model FLOPs count a forward pass three times, hardware FLOPs also what is recomputed.
        model_flops = 3 * self.forward_flops * self.samples / mean
        figures["model_tflops_per_device"] = model_flops / 1e12
        peak = device_peak_flops(self.device)
        if peak:
            figures["mfu"] = model_flops / peak
            figures["hfu"] = model_flops * (4 / 3 if self.recompute else 1) / peak
        self._steps.clear()
        self._waits.clear()
        return figures


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
    minutes, seconds = divmod(int(row.get("eta_s", 0)), 60)
    parts = [f"step {row['step']:>6}/{steps}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "validation_loss" in row:
        parts.append(f"held-out {row['validation_loss']:.4f}")
    if "samples_per_s" in row:
        parts += [
            f"{row['samples_per_s']:.1f} samples/s",
            f"{row['tokens_per_s_per_device'] / 1e3:.1f}k tokens/s/device",
            f"{row['model_tflops_per_device']:.2f} TFLOP/s"
            + (f" (MFU {row['mfu']:.1%}, HFU {row['hfu']:.1%})" if "mfu" in row else ""),
            f"step p50 {row['step_p50_s'] * 1e3:.0f} ms p95 {row['step_p95_s'] * 1e3:.0f} ms",
            f"data wait {row['data_wait_share']:.0%}",
            f"{row['peak_memory_gib']:.1f} GiB",
            f"ETA {minutes}:{seconds:02d}",
        ]
    return "  ".join(parts)
