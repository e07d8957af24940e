"""What the nodes of a run cost, by kind and hour, and what they have come to so far. Knows no Ray."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from models.settings import Settings

Kind = Literal["head", "cpu", "gpu"]
"""The head, whatever it has; of the other nodes those without GPUs, and those with."""


class CostConfig(Settings):
    """Prices of nodes, for the dollars on the status line; 0 is free, or not known. `jobs.plan` fills them in."""

    head_hourly: float = Field(default=0.0, ge=0)
    """Dollars an hour of the head."""
    cpu_hourly: float = Field(default=0.0, ge=0)
    """Dollars an hour of a node without GPUs; on spot, what it is expected to cost."""
    gpu_hourly: float = Field(default=0.0, ge=0)
    """Dollars an hour of a node with GPUs."""

    def per_second(self, nodes: Mapping[Kind, int]) -> float:
        """Dollars a second of so many nodes of each kind."""
        hourly: dict[Kind, float] = {
            "head": self.head_hourly,
            "cpu": self.cpu_hourly,
            "gpu": self.gpu_hourly,
        }
        return sum(hourly[kind] * count for kind, count in nodes.items()) / 3600


class Bill:
    """Adds up while a run runs: each reading pays for the time since the one before, at the nodes seen now."""

    def __init__(self, config: CostConfig, *, dollars: float, now: float) -> None:
        """`dollars`: what earlier lives of the run have come to; `now` in seconds, of any clock."""
        self._config, self._since, self.dollars = config, now, dollars

    def read(self, nodes: Mapping[Kind, int], *, now: float) -> float:
        """Dollars so far."""
        self.dollars += self._config.per_second(nodes) * max(0.0, now - self._since)
        self._since = now
        return self.dollars
