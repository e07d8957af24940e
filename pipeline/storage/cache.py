"""The cache folder, for files that can be regenerated: demo images and compiled kernels. No run data."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$DINORAY_CACHE`, `$XDG_CACHE_HOME/dinoray` or `~/.cache/dinoray`; it may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("DINORAY_CACHE") or Path(cache) / "dinoray")
