"""Which revision of the code is at work."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REVISION_VARIABLE = "STREAMDIT_GIT_REVISION"
"""Environment variable that tells the revision of code that was sent without its repository."""


def git_revision(root: Path | None = None) -> str | None:
    """Revision of the checkout that the code runs from, or of `root`; None outside one.

    A copy that a cluster runs is no checkout: whoever sends it tells its revision.
    """
    if root is None and REVISION_VARIABLE in os.environ:
        return os.environ[REVISION_VARIABLE]
    root = root or Path(__file__).parents[1]
    # Installed, the code may lie in an environment inside a repository that is somebody else's.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # images need no git
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
