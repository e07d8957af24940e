"""The interface of all sinks, the destinations of a run's numbers and pictures.

tracking/run_log.py passes everything to each sink. Files, TensorBoard, gauges and trackers are sinks. No Ray
here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Embedding(NamedTuple):
    """The teacher's `features` float32 [n, D], labels ("" for none) and `thumbnails` uint8 [n, S, S, 3]."""

    features: NDArray[np.float32]
    labels: list[str]
    thumbnails: NDArray[np.uint8]


class MetricSink:
    """Base class that ignores everything; a sink overrides the methods for the data that it can use."""

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log values after `step` steps."""

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Log a picture after `step` steps; pictures of one `name` form a series."""

    def embedding(self, step: int, embedding: Embedding) -> None:
        """Log features after `step` steps."""

    def sync(self) -> None:
        """Store everything logged so far."""

    def close(self, *, failed: bool) -> None:
        """Close the sink: the run ends or Ray is about to restart it. No call follows."""


def numbers(values: Mapping[str, float | str]) -> dict[str, float]:
    """Return the values that are numbers."""
    return {name: value for name, value in values.items() if not isinstance(value, str)}
