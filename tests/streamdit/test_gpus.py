"""GPUs are known by the names that PyTorch gives them."""

import pytest

from streamdit.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_gpu_is_found_by_its_name(name, key):
    assert find_gpu(name) is GPUS[key]


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA H20", "Tesla T4", ""])
def test_a_gpu_that_only_resembles_one_is_not_known(name):
    assert find_gpu(name) is None
