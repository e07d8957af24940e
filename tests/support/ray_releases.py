"""The releases of Ray in which the private names were read, as the docstring of ray_private lists them."""

import re
from importlib.metadata import version

import pytest

from dinoray.pipeline import ray_private


def minor(release: str) -> str:
    """2.60 of 2.60.0."""
    return ".".join(release.split(".")[:2])


TRIED = re.findall(r"\d+\.\d+\.\d+", ray_private.__doc__ or "")
"""The oldest first."""

uses_private_ray = pytest.mark.skipif(
    minor(version("ray")) not in map(minor, TRIED),
    reason=f"uses modules that are private to Ray, known for {', '.join(TRIED)}",
)
