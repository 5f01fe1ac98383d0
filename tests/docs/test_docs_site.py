"""The documentation builds with every link checked, and its generated parts are true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    sys.path.insert(0, str(ROOT / "docs"))
    from hooks import figures, reference

    yield figures, reference
    sys.path.remove(str(ROOT / "docs"))


@pytest.mark.slow
def test_site_builds_without_a_warning_and_asks_nothing_of_other_hosts(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "concepts" / "buffer" / "index.html").read_text()
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page)
    assert [url for url in loaded if "canonical" not in url] == []
    assert (tmp_path / "site" / "images" / "stream.svg").stat().st_size > 10_000
    commands = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text()
    assert "streamdit jobs stop" in commands


def test_broken_link_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = settings[settings.index("validation:") : settings.index("\nnav:")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{validation}")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "gone.md" in result.stderr


def test_figure_of_the_stream_shows_what_the_scheme_says(hooks):
    from streamdit.partition import PartitionScheme

    figures, _ = hooks
    steps = list(figures.moving_buffer(PartitionScheme(K=0, N=2, c=1, s=2), moves=3))
    assert steps == [
        (0, [0.5, 0.0]),
        (0, [0.75, 0.25]),
        (1, [0.5, 0.0]),
        (1, [0.75, 0.25]),
        (2, [0.5, 0.0]),
        (2, [0.75, 0.25]),
    ]


def test_figures_are_svg_and_the_same_each_time(hooks):
    figures, _ = hooks
    for name in figures.FIGURES:
        drawn = figures.draw(name)
        assert drawn.startswith(b"<?xml")
        assert drawn == figures.draw(name)
    assert b">0.875<" in figures.draw("images/stream.svg")


def test_settings_page_has_every_key_with_its_meaning(hooks):
    from jobs.schema_keys import dotted_keys
    from training.config import TrainConfig

    _, reference = hooks
    page = reference.settings_page()
    for key in dotted_keys(TrainConfig):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
        meaning = row.rstrip("| ").rsplit("|", 1)[-1].strip()
        assert len(meaning) > 5, f"{key} has no docstring"
    assert "| `optimizer.learning_rate` | number | `0.0001` | Peak learning rate. |" in page


def test_every_command_and_option_is_on_the_page(hooks):
    from jobs.cli import COMMANDS

    _, reference = hooks
    page = reference.commands_page()
    for name in COMMANDS:
        assert f"## streamdit {name}\n" in page
    assert "`--no-wait`" in page
    assert "### streamdit jobs logs" in page


def test_named_files_exist():
    """Paths of the project that the pages speak of."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"`((?:[\w-]+/)+[\w.*-]+\.\w+)`", page.read_text()):
            top = name.split("/")[0]
            if (ROOT / top).is_dir() and top not in ("runs", "data"):
                pattern = re.sub("STAGE|NAME", "*", name)
                assert list(ROOT.glob(pattern)), f"{page.name}: {name}"


def messages():
    """Every text in the code, with what is filled in written as `...`."""
    for package in ("streamdit", "pipeline", "training", "distillation", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                    yield "".join(map(str, parts))


def test_messages_that_are_explained_are_messages_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page[: page.index("## Without a message")]
    explained = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(explained) > 10
    known = list(messages())
    for message in explained:
        pieces = [re.escape(piece.strip(" '?")) for piece in message.split("...") if piece.strip()]
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        assert any(pattern.search(text) for text in known), message
