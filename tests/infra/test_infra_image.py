"""The container image's recipe: clean by hadolint, pinned, and never root at run time."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra" / "image" / "Dockerfile"


def instructions():
    """Instructions of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    return [i for i in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines() if i.strip()]


def stages():
    """Stage name → its parent and its instructions."""
    found = {}
    for instruction in instructions():
        if match := re.match(r"FROM (\S+) AS (\S+)", instruction):
            parent, name = match.groups()
            found[name] = (parent, [])
        elif found:
            found[name][1].append(instruction)
    return found


def lineage(name):
    """Instructions of a stage and of those that it is built on, the oldest first."""
    parent, own = stages()[name]
    return (lineage(parent) if parent in stages() else []) + own


def test_hadolint_finds_nothing_that_is_not_explained():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not made for this system")
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_image_runs_as_an_unprivileged_user_and_starts_the_command(target):
    steps = lineage(target)
    users = [step.split()[1] for step in steps if step.startswith("USER")]
    assert users == ["1000:100"]
    assert any("useradd --uid 1000 --gid 100" in step for step in steps)
    # Nothing that compiles the requirements is left in it: only the finished environment.
    copied = [step for step in steps if step.startswith("COPY")]
    assert copied == [f"COPY --from=build-{target} /opt/streamdit /opt/streamdit"]
    started = re.search(r'CMD \["streamdit", "(\w+)"\]', "\n".join(steps)).group(1)
    assert started in COMMANDS


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_version_is_the_one_that_is_tested(target):
    installs = [step for step in lineage(f"build-{target}") if "pip install" in step]
    for step in installs:
        assert "--constraint constraints.txt" in step or "--no-deps" in step
    parents = {parent for parent, _ in stages().values()} - set(stages())
    assert parents == {"python:${PYTHON_VERSION}-slim-bookworm"}
    version = re.search(r"ARG PYTHON_VERSION=(\S+)", DOCKERFILE.read_text()).group(1)
    assert re.fullmatch(r"3\.1[123]\.\d+", version)


def test_requirements_are_read_off_the_project(tmp_path):
    """The line of Python in the recipe, run as the recipe runs it."""
    step = next(i for i in instructions() if "requirements.txt" in i and "tomllib" in i)
    command = step.removeprefix("RUN ")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = command.replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(extras["tracking-server"] + extras["ocr"] + extras["transnet"]),
    ]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == wanted


def test_build_sees_every_package_and_nothing_else():
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules[0] == "*"
    included = {rule.strip("!/") for rule in rules if rule.startswith("!")}
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {pattern.rstrip("*") for pattern in find["find"]["include"]}
    assert packages <= included
    assert included - packages <= {
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "serving"),
    }
