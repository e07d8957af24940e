"""HEIC and HEIF, which phones write: read by Pillow if the optional package pillow-heif is there. No Ray here."""

import contextlib
import importlib.util

HEIF_IS_READ = importlib.util.find_spec("pillow_heif") is not None


def register_heif() -> None:
    """Make Pillow open HEIF, if it can be."""
    with contextlib.suppress(ImportError):  # also of a library that the package needs
        from pillow_heif import register_heif_opener

        register_heif_opener()
