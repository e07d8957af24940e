"""Hourly prices of the nodes of a run, by kind. cluster/nodes.py reads them and counts the nodes."""

from pydantic import Field

from dinoray.models.settings import Settings


class CostConfig(Settings):
    """Prices of nodes for the dollars in the status line; 0: free or unknown. `dinoray plan` fills them in."""

    head_hourly: float = Field(default=0.0, ge=0)
    """Dollars an hour of the head."""
    cpu_hourly: float = Field(default=0.0, ge=0)
    """Dollars an hour of a node without GPUs; on spot, what it is expected to cost."""
    gpu_hourly: float = Field(default=0.0, ge=0)
    """Dollars an hour of a node with GPUs."""
