"""Where things are kept that can be made again: drawn images, compiled kernels. Nothing of a run is here."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$DINORAY_CACHE`, else `$XDG_CACHE_HOME/dinoray`, else `~/.cache/dinoray`; it need not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("DINORAY_CACHE") or Path(cache) / "dinoray")
