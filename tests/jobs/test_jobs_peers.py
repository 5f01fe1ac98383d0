"""The comparison with peers runs, after checking that all compute the same."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench_peer import OUR_BLOCK, PEER_BLOCK

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_comparison_with_peers_checks_times_and_prints_every_variant(tmp_path):
    command = [sys.executable, "benchmarks/peers.py", "--preset", "demo", "--depth", "2"]
    done = subprocess.run(
        [*command, "--rounds", "3", "--json", str(tmp_path / "peers.json")],
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
    ours = "our block ÷ diffusers', a time per token (at most 1.05)"
    assert ours in rows
    assert "windows ÷ full attention" in rows
    figures = json.loads((tmp_path / "peers.json").read_text())
    mine, theirs = (figures["milliseconds"]["block"][name] for name in (OUR_BLOCK, PEER_BLOCK))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    assert figures["ratios"][ours] == pytest.approx(statistics.median(ratios))
