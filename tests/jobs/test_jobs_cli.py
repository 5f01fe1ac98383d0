"""The command line as a person meets it: through a real process, with its exit status."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import COMMANDS, app

ROOT = Path(__file__).parents[2]


def environment(**more):
    return {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **more}


def streamdit(*arguments, module="jobs.cli", **options):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def plain(text):
    """Help text without boxes and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def processor_seconds():
    """Time that child processes have used; unlike the clock, it ignores what else runs here."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_overview_names_every_command_and_starts_at_once():
    before = processor_seconds()
    result = streamdit("--help")
    assert processor_seconds() - before < 1.5
    assert result.returncode == 0
    for name, entry in COMMANDS.items():
        assert f"{name} " in result.stdout
        assert entry.help in plain(result.stdout)


def test_overview_loads_no_heavy_library():
    code = (
        "import sys, jobs.cli\n"
        "try: jobs.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'numpy', 'pydantic_core'} & set(sys.modules)),"
        " file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = result.stderr.strip()
    assert "'torch'" not in loaded
    assert "'ray'" not in loaded
    assert "'mlflow'" not in loaded


def test_version_is_one_line():
    result = streamdit("--version")
    assert result.returncode == 0
    assert re.fullmatch(r"streamdit .+\n", result.stdout)


@pytest.fixture
def invoke(monkeypatch):
    """Run a command in this process, where the libraries are loaded only once."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, [*arguments], prog_name="streamdit")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_says_what_it_does_and_its_options(name, invoke):
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    assert f"Usage: streamdit {name}" in text
    if name in ("ingest", "train-autoencoder", "train", "distill", "describe"):
        assert "--config" in text
        assert "KEY=VALUE" in text


def test_command_runs_as_a_module_with_the_same_options(invoke):
    as_module = streamdit("--help", module="jobs.train")
    assert as_module.returncode == 0, as_module.stderr
    assert "Usage: python -m jobs.train [OPTIONS] {DATASET} [KEY=VALUE]..." in plain(
        as_module.stdout
    )
    options = re.findall(r"--[a-z-]+", invoke("train", "--help").output)
    assert "--preset" in options
    assert re.findall(r"--[a-z-]+", as_module.stdout) == options


def test_misspelt_command_is_answered_with_the_nearest():
    result = streamdit("trian")
    assert result.returncode == 2
    assert "Did you mean 'train'?" in result.stderr


def test_usage_error_has_status_2_and_no_traceback(invoke):
    result = invoke("describe", "--no-such-option")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_mistake_ends_a_real_process_with_one_line_and_status_2():
    result = streamdit("describe", "demo", "sampling.chunk_frames=3")
    assert result.returncode == 2
    assert result.stderr == (
        "error: chunk_frames 3 does not divide B - K = 8 - 0 = 8; choose chunk_frames from "
        "[1, 2, 4, 8]\n"
    )
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("describe", "demo", "optimizer.learning_rat=1"),
            "error: optimizer.learning_rat=1 (from the command line) is not a known key: did you "
            "mean optimizer.learning_rate?\n",
        ),
        (
            ("describe", "demo", "steps=many"),
            "error: steps=many (from the command line) does not fit: it should be a valid "
            "integer, unable to parse string as an integer; set steps=VALUE accordingly\n",
        ),
        (
            ("ingest", "videos", "--out", "data"),
            "error: encode needs --autoencoder: train one with `streamdit ingest ... --only "
            "curate` and `streamdit train-autoencoder data --out DIR`, or name a diffusers VAE\n",
        ),
    ],
    ids=["unknown key", "wrong type", "no autoencoder"],
)
def test_mistake_is_one_line_with_the_remedy(arguments, expected, invoke):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr == expected
    assert result.stdout == ""


def write_job(tmp_path, body):
    (tmp_path / "odd_job.py").write_text(
        "from jobs.cli import build_command\n"
        "import time\n"
        f"def command() -> None:\n    'Odd.'\n    {body}\n"
        "build_command(command, 'odd')(prog_name='odd')\n"
    )
    return tmp_path / "odd_job.py"


def run_job(path):
    return subprocess.Popen(
        [sys.executable, path],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts():
    """A shell's background jobs ignore Ctrl-C, and their children with them; this one shall not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_command_says_how_to_go_on(tmp_path):
    job = run_job(write_job(tmp_path, "print('up', flush=True); time.sleep(60)"))
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGINT)
    _, stderr = job.communicate(timeout=30)
    assert job.returncode == 130
    assert stderr == (
        "interrupted: finished parts are kept; the same command continues from there\n"
    )


def test_bug_shows_its_traceback(tmp_path):
    job = run_job(write_job(tmp_path, "raise ValueError('a bug')"))
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "Traceback (most recent call last)" in stderr
    assert stderr.rstrip().endswith("ValueError: a bug")


def test_message_of_several_lines_is_shown_as_one(tmp_path):
    job = run_job(
        write_job(
            tmp_path,
            "from streamdit.errors import UserError; raise UserError('first [bold]\\n  second')",
        )
    )
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 2
    assert stderr == "error: first [bold] second\n"
