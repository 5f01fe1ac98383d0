"""The package: what is in the wheel and the sdist, that it runs from there, and its papers."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import streamdit

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [
    pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
]


def shipped():
    """Files of the packages in the checkout: code, presets, pages, and the mark of types."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                found.add(path.relative_to(ROOT).as_posix())
    return found


def run(*words, cwd, **options):
    result = subprocess.run(
        [*map(str, words)], cwd=cwd, capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, built from what git would hand on."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "out", cwd=source)
    (wheel,) = (folder / "out").glob("*.whl")
    (sdist,) = (folder / "out").glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_wheel_holds_the_rooms_and_nothing_else(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert names == shipped()
    assert "streamdit/py.typed" in names
    assert f"Version: {streamdit.__version__}" in text
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in text


@pytest.mark.slow
def test_sdist_builds_the_same_package(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md"} <= names
    assert shipped() <= names


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_checkout(built, tmp_path):
    wheel, _ = built
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The libraries are those that are here already.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = tmp_path / "venv" / "bin" / "streamdit"
    said = run(command, "--version", cwd=tmp_path, env=environment)
    assert said == f"streamdit {streamdit.__version__}\n"
    where = "import jobs.cli, streamdit, configs; print(streamdit.__file__, configs.__file__)"
    for path in run(python, "-c", where, cwd=tmp_path, env=environment).split():
        assert Path(path).is_relative_to(site)
    assert "parameters" in run(command, "describe", "demo", "--json", cwd=tmp_path, env=environment)


def test_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert streamdit.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    for path in (ROOT / "infra").rglob("*"):
        if path.is_file():
            for tag in re.findall(r"streamdit:(\d[\w.]*)", path.read_text()):
                assert tag == version, path


def test_citation_and_commit_hooks_are_well_formed():
    python = sys.executable
    schema = ("--builtin-schema", "vendor.citation-file-format")
    run(python, "-m", "check_jsonschema", *schema, ROOT / "CITATION.cff", cwd=ROOT)
    hooks = ROOT / ".pre-commit-config.yaml"
    run(python, "-m", "pre_commit", "validate-config", hooks, cwd=ROOT)
    # Each runs a program of the development environment.
    for hook in yaml.safe_load(hooks.read_text())["repos"][0]["hooks"]:
        assert (Path(python).parent / hook["entry"].split()[0]).exists(), hook["id"]


def test_every_pinned_version_is_inside_the_declared_range():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in [*PROJECT["project"]["dependencies"], *(entry for e in extras for entry in e)]:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        if name == "streamdit":
            continue
        assert name in pins, f"{name} has no pinned version"
        assert requirement.specifier.contains(pins[name], prereleases=True), line
