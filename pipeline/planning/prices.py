"""Instance types with their prices, and the settings of a plan, with figures that replace measurements.

forecast.py does the arithmetic. There is no Ray here and no price service: prices change, so check them.
"""

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from dinoray.models.settings import Settings

PRICED = "list prices of us-east-1, Linux, on demand, as noted in November 2026"
"""Source of the table below; a plan prints it beside its dollars."""


class NodeType(Settings):
    """An instance type: its price and what is in it."""

    hourly: float = Field(ge=0)
    """Dollars an hour on demand."""
    cpus: int = Field(ge=1)
    """Virtual CPUs."""
    gpus: int = Field(default=0, ge=0)
    """GPUs."""
    gbit: float = Field(gt=0)
    """Gigabits a second that its network carries for hours, each way; not what it carries for minutes."""
    memory_gib: float = Field(gt=0)
    """GiB of memory."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """GiB of memory of each GPU; None: not known, so whether a step fits is not said."""


def _of(
    hourly: float, cpus: int, gpus: int, gbit: float, memory_gib: float, gpu_memory_gib: float | None = None
) -> NodeType:
    sizes = {"gbit": gbit, "memory_gib": memory_gib, "gpu_memory_gib": gpu_memory_gib}
    return NodeType(hourly=hourly, cpus=cpus, gpus=gpus, **sizes)


NODE_TYPES = {
    "m6id.xlarge": _of(0.2373, 4, 0, 1.562, 16),
    "m6id.2xlarge": _of(0.4746, 8, 0, 3.125, 32),
    "c6id.2xlarge": _of(0.4032, 8, 0, 3.125, 16),
    "c6id.4xlarge": _of(0.8064, 16, 0, 6.25, 32),
    "c6id.8xlarge": _of(1.6128, 32, 0, 12.5, 64),
    "c6id.16xlarge": _of(3.2256, 64, 0, 25, 128),
    "c6in.2xlarge": _of(0.4536, 8, 0, 12.5, 16),
    "c6in.4xlarge": _of(0.9072, 16, 0, 25, 32),
    "c6in.8xlarge": _of(1.8144, 32, 0, 50, 64),
    "g5.xlarge": _of(1.006, 4, 1, 2.5, 16, 22.35),
    "g5.12xlarge": _of(5.672, 48, 4, 40, 192, 22.35),
    "g5.48xlarge": _of(16.288, 192, 8, 100, 768, 22.35),
    "g6.xlarge": _of(0.8048, 4, 1, 2.5, 16, 22.35),
    "g6.12xlarge": _of(4.6016, 48, 4, 40, 192, 22.35),
    "g6.48xlarge": _of(13.3504, 192, 8, 100, 768, 22.35),
    "g6e.xlarge": _of(1.861, 4, 1, 2.5, 32, 44.7),
    "g6e.4xlarge": _of(3.00424, 16, 1, 20, 128, 44.7),
    "g6e.12xlarge": _of(10.49264, 48, 4, 100, 384, 44.7),
    "g6e.48xlarge": _of(30.13118, 192, 8, 400, 1536, 44.7),
    "p4d.24xlarge": _of(21.9576, 96, 8, 100, 1152, 40),
    "p5.48xlarge": _of(55.04, 192, 8, 100, 2048, 80),
}
"""Instance types of cluster.yaml, and their neighbours."""


class PlanSettings(Settings):
    """What a run is planned with. Figures that are not given are measured, on this machine and on these images."""

    num_images: int | None = Field(default=None, ge=1)
    """Images of an epoch; None: listed."""
    bytes_per_image: float | None = Field(default=None, gt=0)
    """Bytes of an encoded image, on average; None: listed."""
    images_per_request: float | None = Field(default=None, ge=1)
    """Images that one request to storage brings: 1 for objects, the rows of a row group for Parquet; None: listed."""
    latency_ms: float | None = Field(default=None, ge=0)
    """Milliseconds from a request for an image to its last byte; None: measured from here."""
    images_per_second_per_cpu: float | None = Field(default=None, gt=0)
    """Images that a virtual CPU, all others busy as well, fetches, decodes and crops a second; None: measured."""
    images_per_second_per_gpu: float | None = Field(default=None, gt=0)
    """Images that a GPU trains on a second, at its share of the batch; None: measured, where there is a GPU."""
    seconds: float = Field(default=10.0, gt=0, le=600)
    """How long each of the two measurements takes, beside what comes first: compiling, warming up."""
    cpu_node: str = "c6id.8xlarge"
    """Instance type of the nodes that augment."""
    gpu_node: str = "g6e.12xlarge"
    """Instance type of the nodes that train."""
    head_node: str = "m6id.2xlarge"
    """Instance type of the head."""
    availability_zone: str | None = None
    """The one zone of all nodes, for cluster.yaml, such as us-east-1a: in the region of the bucket."""
    spot_share: float = Field(default=0.45, gt=0, le=1)
    """Share of the price on demand that CPU nodes cost, being spot: it varies by day and zone. 1: on demand."""
    startup_minutes: float = Field(default=15.0, ge=0)
    """Minutes that nodes are paid for and do not train: booting, installing, at the end waiting to be let go."""
    dollars_per_million_requests: float = Field(default=0.4, ge=0)
    """What storage takes for reads."""
    dollars_per_gb_across_zones: float = Field(default=0.02, ge=0)
    """What crops would cost on their way to another zone, both directions' fees together."""
    prices: dict[str, NodeType] = Field(default=NODE_TYPES)
    """Instance types by name: `plan.prices={g6e.12xlarge: {hourly: 9.9}}` changes one, all other values stay."""

    @field_validator("prices", mode="before")
    @classmethod
    def _changes_what_is_known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {name: node.model_dump() for name, node in NODE_TYPES.items()}
        changed = {
            name: {**known.get(name, {}), **node} if isinstance(node, dict) else node
            for name, node in given.items()
        }
        needed = [name for name, field in NodeType.model_fields.items() if field.is_required()]
        for name, node in changed.items():
            missing = [key for key in needed if isinstance(node, dict) and key not in node]
            if missing:
                raise ValueError(f"plan.prices: {name} is new and lacks {', '.join(missing)}; add them")
        return known | changed

    @field_validator("availability_zone")
    @classmethod
    def _is_a_zone(cls, zone: str | None) -> str | None:
        if zone is not None and not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d[a-z]", zone):
            raise ValueError(
                f"plan.availability_zone={zone} must be a region and a letter, e.g. plan.availability_zone=us-east-1a"
            )
        return zone

    @model_validator(mode="after")
    def _names_nodes_of_the_table(self) -> "PlanSettings":
        for field in ("cpu_node", "gpu_node", "head_node"):
            name = getattr(self, field)
            if name not in self.prices:
                raise ValueError(
                    f"plan.{field}={name} is not in plan.prices ({', '.join(sorted(self.prices))}); add it: "
                    f"plan.prices={{{name}: {{hourly: 1.5, cpus: 8, gpus: 0, gbit: 10, memory_gib: 32}}}}"
                )
        for field, wants in (("gpu_node", True), ("cpu_node", False)):
            name = getattr(self, field)
            if (self.prices[name].gpus > 0) is not wants:
                what = "no GPU" if wants else "GPUs, which would be paid for and do nothing"
                raise ValueError(
                    f"plan.{field}={name} has {what}; take {', '.join(self.named(with_gpus=wants))}"
                )
        return self

    def named(self, *, with_gpus: bool) -> list[str]:
        """Return the names of instance types with or without GPUs, the cheapest first."""
        names = [name for name, node in self.prices.items() if (node.gpus > 0) is with_gpus]
        return sorted(names, key=lambda name: self.prices[name].hourly)

    @property
    def head(self) -> NodeType:
        """Return the instance type of the head."""
        return self.prices[self.head_node]

    @property
    def cpu(self) -> NodeType:
        """Return the instance type of the nodes that augment."""
        return self.prices[self.cpu_node]

    @property
    def gpu(self) -> NodeType:
        """Return the instance type of the nodes that train."""
        return self.prices[self.gpu_node]
