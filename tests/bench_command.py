"""`streamdit bench` as tests run it: two rounds of the demo, and its figures read back."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from jobs.cli import app


def bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Figures and output of `streamdit bench ARGUMENTS`, which must not fail."""
    file = folder / "figures.json"
    defaults = ["--preset", "demo", "--rounds", "2", "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", *arguments, *defaults])
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text()), result.stdout
