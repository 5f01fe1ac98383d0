"""The drivers keep little of each clip."""

import re
import subprocess
import sys

import pytest

BOUND = 800
"""Bytes for each further clip; the rows of one, as Python objects, take thousands."""


@pytest.mark.slow
def test_memory_of_the_drivers_hardly_grows_with_the_number_of_clips():
    command = [sys.executable, "benchmarks/driver_memory.py", "--units", "32", "256"]
    few_at_once = ["--rows", "1024", "--readers", "2"]
    done = subprocess.run([*command, *few_at_once], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^ +4,096 clips .*\n +32,768 clips ", done.stdout), done.stdout
    (grown,) = re.findall(r"(-?\d+) B for each further clip", done.stdout)
    assert int(grown) < BOUND, done.stdout
