"""Runs code in an interpreter of its own."""

import os
import subprocess
import sys

from paths import ROOT


def run_python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter in the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
