"""The comparison with peers runs, after checking that all compute the same."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_comparison_with_peers_checks_times_and_prints_every_variant():
    command = [sys.executable, "benchmarks/peers.py", "--preset", "demo", "--depth", "2"]
    done = subprocess.run(
        [*command, "--rounds", "1"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0].strip("| ") for line in done.stdout.splitlines() if "|" in line]
    for variant in ("diffusers, a time per token", "ours, prepared", "windows as a mask"):
        assert variant in rows
    assert "our block ÷ diffusers, a time per token (at most 1.05)" in rows
    assert "windows ÷ full attention" in rows
