"""Every command and program in the documentation runs, in small, in the order of its page.

A page says in `setup:` what lies in the folder that its blocks run in; README in a comment, which
is not shown. The commands stand in the pages at their real size; here `streamdit` and `torchrun`
are stand-ins that add settings which make models and clips tiny, and run the real thing.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from latent_dataset import tiny_autoencoder, write_dataset
from mlflow_server import S3_KEYS, s3_client, simulated_s3
from model_directory import write_model_directory
from ray_head import ray_head

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*$")

MODEL = (
    "model.latent_channels=4",
    "model.buckets=[{frames: 4, height: 4, width: 4, window: [2, 2, 2]}]",
    *("model.width=32", "model.depth=2", "model.heads=2", "model.ffn_width=64"),
    *("model.text={bytes: 16}", "model.time_frequencies=32"),
    "partition.entries=[{chunk_frames: 1}, {chunk_frames: 2}, {chunk_frames: 4}]",
    *("sampling.chunk_frames=1", "sampling.micro_steps=2"),
)
RUN = (
    *("steps=2", "global_batch=4", "micro_batch=null", "precision=float32", "zero_stage=1"),
    *("validation.samples=2", "launch.workers=1", "launch.use_gpu=false"),
    *("launch.cpus_per_worker=1", "activation_checkpointing=false"),
)
SMALL = {
    "ingest": (
        *("clip.frames=16", "clip.height=32", "clip.width=32", "clip.stride_frames=16"),
        "text_encoders=[{name: bytes, kind: bytes, width: 16, max_tokens: 16}]",
        "selection.held_out_share=0",
    ),
    "train-autoencoder": (
        *("model.latent_channels=4", "model.patch=[1, 4, 4]", "model.widths=[8, 8]"),
        *(
            "model.strides=[[4, 2, 2]]",
            "model.encoder_blocks=[1, 1]",
            "model.decoder_blocks=[1, 1]",
        ),
        *("steps=2", "batch=2", "frames=8", "statistics_clips=4", "fit_clips=4", "workers=1"),
        *("held_out_share=0.3", "held_out_clips=1", "crop=[32, 32]"),
    ),
    "train": (*MODEL, *RUN),
    "distill": (*RUN, "teacher.chunk_frames=1", "teacher.micro_steps=2"),
    "rollouts": (*RUN, "teacher.chunk_frames=1", "teacher.micro_steps=2"),
    "bench": ("--rounds", "2"),
}
"""Settings that make a command small; those that the page itself gives come after them and win."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    excuse: str | None


def blocks(page):
    """Blocks of `bash` and `python`, with the reason given for those that are not run."""
    lines = page.read_text().splitlines()
    found, inside = [], None
    for number, line in enumerate(lines):
        if inside is None and (match := re.match(r"```(bash|python)\s*$", line)):
            inside = (number + 1, match.group(1))
        elif inside is not None and line.startswith("```"):
            start, language = inside
            above = NOT_RUN.search(lines[start - 2]) if start >= 2 else None
            text = "\n".join(lines[start:number])
            found.append(Block(start + 1, language, text, above and above.group(1)))
            inside = None
    return found


def setup_of(page):
    match = re.match(r"(?:---\n|<!-- )(.*?)(?:\n---| -->)\n", page.read_text(), re.DOTALL)
    return yaml.safe_load(match.group(1)).get("setup", []) if match else []


RUNNABLE = [page for page in PAGES if any(block.excuse is None for block in blocks(page))]


def test_pages_are_found_and_reasons_are_given():
    assert len(RUNNABLE) > 5
    assert ROOT / "README.md" in RUNNABLE
    for page in PAGES:
        for block in blocks(page):
            assert block.excuse is None or len(block.excuse) > 10, f"{page}:{block.line}"


def test_rows_of_a_table_follow_each_other():
    """After a blank line a row is a paragraph, with its bars shown."""
    for page in PAGES:
        lines = page.read_text().splitlines()
        for number, (above, line) in enumerate(itertools.pairwise(lines), 2):
            if line.startswith("|") and not above.strip():
                below = lines[number] if number < len(lines) else ""
                assert re.match(r"\|[-:| ]+\|$", below), f"{page}:{number}: no head of a table"


def test_commands_that_are_not_run_exist_with_their_options():
    """What cannot run here (other machines, gigabytes) is at least parsed by the real command."""
    from jobs.cli import COMMANDS, build_command

    checked = 0
    for page in PAGES:
        for block in blocks(page):
            if block.excuse is None or block.language != "bash":
                continue
            text = block.text.replace("\\\n", " ")
            for words in re.findall(r"^(?:.*-m jobs\.|streamdit )(.+)$", text, re.MULTILINE):
                name, *arguments = words.split("#")[0].split()
                module = __import__(COMMANDS[name].module, fromlist=["command"])
                build_command(module.command, name).make_context(name, arguments)
                checked += 1
    assert checked


@pytest.fixture
def stand_ins(tmp_path):
    """A folder for PATH with `streamdit` and `torchrun` that make their commands small."""
    folder = tmp_path / "bin"
    folder.mkdir()
    table = repr(SMALL)
    (folder / "small.py").write_text(
        f"SMALL = {table}\n"
        "def smaller(name, words):\n"
        "    keys = [i for i, w in enumerate(words) if '=' in w and not w.startswith('-')]\n"
        "    at = keys[0] if keys and name != 'submit' else len(words)\n"
        "    inner = words[0] if name == 'submit' else name\n"
        "    return [*words[:at], *SMALL.get(inner, ()), *words[at:]]\n"
    )
    programs = {
        "streamdit": "import runpy\n"
        "sys.argv = ['streamdit', sys.argv[1], *smaller(sys.argv[1], sys.argv[2:])]\n"
        "runpy.run_module('jobs.cli', run_name='__main__')\n",
        "torchrun": "import runpy\n"
        "at = next(i for i, w in enumerate(sys.argv) if w.startswith('jobs.')) + 1\n"
        "name = sys.argv[at - 1].removeprefix('jobs.')\n"
        "sys.argv = ['torchrun', *sys.argv[1:at], *smaller(name, sys.argv[at:])]\n"
        "runpy.run_module('torch.distributed.run', run_name='__main__')\n",
    }
    for name, program in programs.items():
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(folder)!r})\n"
            f"from small import smaller\n{program}"
        )
        path.chmod(0o755)
    return folder


def prepare(name, work, stack, environment):
    """Put what a page's `setup:` names into its folder."""
    if name == "videos":
        from evaluation.sprites import SpriteWorldConfig, make_world

        make_world(work / "my_videos", SpriteWorldConfig(videos=2, shots_per_video=3, size=32))
    elif name == "autoencoder":
        tiny_autoencoder(work / "autoencoder")
    elif name == "dataset":
        write_dataset(work / "data")
    elif name in ("teacher", "student"):
        write_model_directory(work / "runs" / name)
    elif name == "s3":
        environment |= store_with_videos(work, stack)
    elif name == "shared":
        environment["SHARED"] = str(shared_storage(work))
    elif name == "cluster":
        for package in ("streamdit", "pipeline", "training", "distillation", "jobs", "configs"):
            shutil.copytree(
                ROOT / package, work / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        head = stack.enter_context(ray_head(work.parent))
        environment |= {"RAY_API_SERVER_ADDRESS": head, "RAY_AUTH_MODE": "disabled"}
    else:
        raise AssertionError(f"setup: {name} is not known")


def shared_storage(work):
    """What the pages call /mnt/streamdit, with videos and an autoencoder on it."""
    shared = work.parent / "shared"
    shared.mkdir()
    shutil.move(work / "my_videos", shared / "videos")
    shutil.move(work / "autoencoder", shared / "autoencoder")
    return shared


def store_with_videos(work, stack):
    """A store that behaves like S3, with the videos in it; the environment that finds it."""
    address = stack.enter_context(simulated_s3("raw-videos"))
    for path in (work / "my_videos").iterdir():
        s3_client(address).upload_file(str(path), "raw-videos", f"2026/{path.name}")
    return {"AWS_ENDPOINT_URL_S3": address, **S3_KEYS}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_blocks_of_a_page_run_in_order(page, tmp_path, stand_ins):
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    with ExitStack() as stack:
        for name in setup_of(page):
            prepare(name, work, stack, environment)
        for block in blocks(page):
            if block.excuse is None:
                run(block, page, work, environment)


def run(block, page, work, environment):
    text = block.text.replace("/mnt/streamdit", environment.get("SHARED", "/mnt/streamdit"))
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", text]
    else:
        command = [sys.executable, "-c", text]
    result = subprocess.run(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert result.returncode == 0, (
        f"{page.relative_to(ROOT)}:{block.line}\n{text}\n{result.stdout[-3000:]}\n"
        f"{result.stderr[-3000:]}"
    )
