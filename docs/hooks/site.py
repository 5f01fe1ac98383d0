"""MkDocs hooks: add the pages and figures that are made from the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "docs"):  # `mkdocs` puts neither on the path
    sys.path.insert(0, str(folder))

from hooks.figures import FIGURES, draw  # noqa: E402
from hooks.reference import commands_page, settings_page  # noqa: E402

PAGES = {
    "reference/commands.md": commands_page,
    "reference/settings.md": settings_page,
}


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated to what lies in the folder."""
    for name in FIGURES:
        files.append(File.generated(config, name, content=draw(name)))
    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Drop Sphinx's roles, which docstrings use for names of things."""
    return re.sub(r":(?:func|class|meth|mod|data):(?=<code>|<a )", "", html)
