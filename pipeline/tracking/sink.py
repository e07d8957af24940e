"""What a place that a run's numbers and pictures go to can be given: the one shape of all of them.

tracking/run_log.py hands everything to each sink; files, TensorBoard, gauges and trackers are sinks. No Ray here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Embedding(NamedTuple):
    """Some images as the teacher sees them: `features` float32 [n, D], labels ("" for none), `thumbnails` uint8
    [n, S, S, 3]."""

    features: NDArray[np.float32]
    labels: list[str]
    thumbnails: NDArray[np.uint8]


class Sink:
    """Takes what it can show, and lets the rest pass."""

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Values as of `step` steps done."""

    def picture(self, name: str, step: int, png: bytes) -> None:
        """One of the pictures of this name, by step."""

    def embedding(self, step: int, embedding: Embedding) -> None:
        """Features as of `step` steps done."""

    def sync(self) -> None:
        """Make everything so far safe."""

    def close(self, *, failed: bool) -> None:
        """The run ends here, or is about to be started again by Ray; nothing comes after."""


def numbers(values: Mapping[str, float | str]) -> dict[str, float]:
    """Those values that can be drawn."""
    return {name: value for name, value in values.items() if not isinstance(value, str)}
