"""What a cluster job takes along: code and settings; never data, secrets or environments."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs.package import collect
from streamdit.errors import UserError

ROOT = Path(__file__).parents[2]


def fill(folder, *files, size=10):
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def packed(folder, **options):
    return [file.as_posix() for file in collect(folder, **options).files]


def test_code_and_settings_go_along_and_the_rest_stays(tmp_path):
    fill(tmp_path, "jobs/train.py", "my.yaml", "notes/data/table.csv")
    fill(tmp_path, ".git/config", ".venv/bin/python", "runs/a/step-1", "data/manifest.json")
    fill(tmp_path, "a.mp4", "jobs/__pycache__/train.pyc", "deep/model.safetensors", ".env")
    assert packed(tmp_path) == ["jobs/train.py", "my.yaml", "notes/data/table.csv"]


def test_ignore_files_and_exclude_are_heeded(tmp_path):
    fill(tmp_path, "keep.py", "secret.txt", "big/one", "logs/a.log", "logs/b.txt")
    (tmp_path / ".gitignore").write_text("secret.txt\n# a comment\n*.log\n")
    (tmp_path / ".rayignore").write_text("/big/\n")
    assert packed(tmp_path, exclude=["b.*"]) == [".gitignore", ".rayignore", "keep.py"]


def test_too_large_a_folder_is_refused_with_what_is_large(tmp_path):
    fill(tmp_path, "code.py")
    fill(tmp_path, "videos/one.bin", "videos/two.bin", size=600)
    with pytest.raises(UserError) as caught:
        collect(tmp_path, limit=1000)
    message = str(caught.value)
    assert "more than 1.0 kB" in message
    assert "videos/ 1.2 kB" in message
    assert "--exclude" in message


def test_package_has_the_files_and_the_same_bytes_each_time(tmp_path):
    source = tmp_path / "source"
    fill(source, "a/one.py", "two.yaml")
    (source / "two.yaml").chmod(0o755)
    first = collect(source).write(tmp_path / "first.zip")
    (source / "a" / "one.py").touch()
    second = collect(source).write(tmp_path / "second.zip")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == ["a/one.py", "two.yaml"]
        assert archive.read("a/one.py") == b"x" * 10
        assert archive.getinfo("two.yaml").external_attr >> 16 == 0o755


def test_packed_checkout_runs_by_itself(tmp_path):
    package = collect(ROOT)
    assert package.size < 20_000_000
    with zipfile.ZipFile(package.write(tmp_path / "package.zip")) as archive:
        archive.extractall(tmp_path / "job")
    result = subprocess.run(
        [sys.executable, "-m", "jobs.describe", "demo", "--json"],
        cwd=tmp_path / "job",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "job")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert '"parameters"' in result.stdout


def test_missing_working_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        collect(tmp_path / "nowhere")
