"""What GPUs can do at most, by their vendor's data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU; dense, without structured sparsity.

    Attributes:
        title: name, as people say it.
        bf16: bf16 operations per second on tensor cores, with float32 sums.
        fp8: fp8 operations per second, or None where the chip has none.
        memory: bytes of device memory.
        bandwidth: bytes per second of device memory.
        source: data sheet that says so.
    """

    title: str
    bf16: float
    fp8: float | None
    memory: float
    bandwidth: float
    source: str


# Where a data sheet gives rates with sparsity only, half of that.
GPUS = {
    "h200": Gpu("H200 SXM", 989e12, 1979e12, 141e9, 4.8e12, "NVIDIA H200 data sheet"),
    "h100": Gpu("H100 SXM", 989e12, 1979e12, 80e9, 3.35e12, "NVIDIA H100 data sheet"),
    "h100-nvl": Gpu("H100 NVL", 835e12, 1671e12, 94e9, 3.9e12, "NVIDIA H100 data sheet"),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 1513e12, 80e9, 2.0e12, "NVIDIA H100 PCIe data sheet"),
    "b200": Gpu("B200", 2250e12, 4500e12, 180e9, 8.0e12, "NVIDIA HGX B200 data sheet"),
    "a100": Gpu("A100 SXM 80 GB", 312e12, None, 80e9, 2.039e12, "NVIDIA A100 data sheet"),
    "a100-40gb": Gpu("A100 SXM 40 GB", 312e12, None, 40e9, 1.555e12, "NVIDIA A100 data sheet"),
    "l40s": Gpu("L40S", 362e12, 733e12, 48e9, 0.864e12, "NVIDIA L40S data sheet"),
}
"""By the name that `streamdit describe --gpu` takes."""


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that PyTorch calls `device_name`, such as "NVIDIA H100 80GB HBM3"."""
    said = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    fitting = [key for key in GPUS if said.issuperset(key.split("-"))]
    return GPUS[max(fitting, key=len)] if fitting else None
