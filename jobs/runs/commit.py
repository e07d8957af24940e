"""Which commit of the code runs."""

import shutil
import subprocess
from pathlib import Path

COMMIT = "DINORAY_COMMIT"
"""The environment variable by which jobs.submit names the commit of code that travels without its history."""


def commit_of(folder: Path) -> str | None:
    """What is checked out there, `-dirty` if it was changed since; None without a history, or without git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    asked = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
