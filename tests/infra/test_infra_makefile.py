"""The Makefile: what its targets would do, and that a wrong Python is refused clearly."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(*arguments, folder=ROOT):
    # As from a shell: when make itself runs the tests, its own flags must not reach this one.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path):
    """A fresh checkout without environment, as far as make can tell."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_demo_makes_the_environment_first_and_then_runs_the_command(checkout):
    result = make("-n", "demo", folder=checkout)
    assert result.returncode == 0, result.stderr
    plan = result.stdout
    steps = ["-m venv .venv", '-c constraints.txt -e ".[dev]"', ".venv/bin/streamdit demo --out"]
    places = [plan.index(step) for step in steps]
    assert places == sorted(places)
    assert plan.rstrip().endswith(".venv/bin/streamdit demo --out runs/demo")


def test_finished_environment_is_not_made_again(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".ready").touch()
    assert (
        make("-n", "demo", folder=checkout).stdout == ".venv/bin/streamdit demo --out runs/demo\n"
    )


def test_changed_constraints_bring_the_environment_up_to_date(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".ready").touch()
    later = (checkout / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert "-c constraints.txt" in make("-n", "test", folder=checkout).stdout


def test_test_and_test_all_together_run_every_test_once(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".ready").touch()
    quick = make("-n", "test", folder=checkout).stdout
    rest = make("-n", "test-all", folder=checkout).stdout
    assert '-m "not slow and not gpu"' in quick
    assert '-m "slow or gpu"' in rest
    for linter in ("ruff check", "ruff format --check", "mypy", "lint-imports"):
        assert f".venv/bin/{linter}" in rest


def test_python_of_another_version_is_refused_with_the_remedy(checkout):
    old = checkout / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make("setup", f"PYTHON={old}", folder=checkout)
    assert result.returncode == 2
    assert f"error: {old} is not Python 3.11, 3.12 or 3.13" in result.stderr
    assert "make setup PYTHON=python3.12" in result.stderr
    assert not (checkout / ".venv").exists()


def test_help_lists_every_public_target():
    text = make("help").stdout
    for target in ("demo", "test", "test-all", "lint", "setup", "clean", "help"):
        assert f"make {target} " in text
