"""The Slurm script: clean by shellcheck, and run for real with stand-ins for Slurm's commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "slurm" / "train.sbatch"


@pytest.mark.parametrize("script", [SCRIPT, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_script_is_clean(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def slurm(tmp_path):
    """Run the script as node 0 of a job; returns its result and what torchrun was given."""

    def executable(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    executable(tmp_path / "bin" / "scontrol", "printf 'node7\\nnode8\\n'")
    executable(
        tmp_path / "bin" / "srun",
        'export SLURM_CPUS_PER_TASK="$SRUN_CPUS_PER_TASK"; shift; exec "$@"',
    )
    executable(
        tmp_path / "venv" / "bin" / "torchrun",
        'echo "$OMP_NUM_THREADS"; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; '
        'echo "$SLURM_CPUS_PER_TASK"; printf "%s\\n" "$@"',
    )

    def run(*arguments, **environment):
        return subprocess.run(
            ["bash", SCRIPT, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "STREAMDIT_VENV": str(tmp_path / "venv"),
                "SLURM_JOB_NODELIST": "node[7-8]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_JOB_ID": "40123",
                "SLURM_GPUS_ON_NODE": "8",
                "SLURM_CPUS_PER_TASK": "64",
                **environment,
            },
        )

    return run


def test_every_node_meets_at_the_first_one_and_passes_the_arguments_on(slurm):
    result = slurm("/data/my videos", "--out", "/runs/a", "steps=10")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[3:] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node7:20123",
        "--rdzv-id=40123-0",
        "-m",
        "jobs.train",
        "/data/my videos",
        "--out",
        "/runs/a",
        "steps=10",
    ]


def test_srun_gives_the_cores_that_the_job_has(slurm):
    assert slurm("/data").stdout.splitlines()[2] == "64"
    assert slurm("/data", SLURM_CPUS_PER_TASK="").stdout.splitlines()[2] == "1"


def test_distillation_runs_by_its_name(slurm):
    said = slurm("/data", "--teacher", "/t", STREAMDIT_JOB="distill").stdout.splitlines()
    assert said[-5:] == ["-m", "jobs.distill", "/data", "--teacher", "/t"]


def test_node_without_gpu_runs_one_process_with_all_its_cores(slurm):
    result = slurm("/data", SLURM_GPUS_ON_NODE="", SLURM_CPUS_PER_TASK="4")
    assert "--nproc-per-node=1" in result.stdout.splitlines()
    assert result.stdout.splitlines()[0] == "4"


def test_workers_have_as_long_to_save_as_slurm_gives_them_or_as_is_said(slurm):
    (warned,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert 30 < int(slurm("/data").stdout.splitlines()[1]) < int(warned)
    result = slurm("/data", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="600")
    assert result.stdout.splitlines()[1] == "600"


def test_requeued_job_does_not_join_the_rendezvous_of_its_first_life(slurm):
    assert "--rdzv-id=40123-2" in slurm("/data", SLURM_RESTART_COUNT="2").stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        ((), {}, "no dataset given"),
        (("/data",), {"STREAMDIT_VENV": "/nowhere"}, "no torchrun"),
        (("/data",), {"STREAMDIT_JOB": "ingest"}, "set it to train or distill"),
    ],
)
def test_what_is_missing_is_said_in_one_line(slurm, arguments, environment, reason):
    result = slurm(*arguments, **environment)
    assert result.returncode == 2
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1
