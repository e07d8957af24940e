"""The share of their rate that GPUs keep when more of them exchange gradients: arithmetic, nothing is measured.

Each GPU keeps its images per step, so the batch grows with the number of GPUs (weak scaling). Assumed are:

- Gradients are float32, all-reduced in a ring that enters and leaves each node once: 2 (n - 1) / n of their bytes pass
  each link. Within one node they pass a link of `NODE_BYTES_PER_SECOND`.
- A node's link, `gbit` of plan.prices, carries `LINK_SHARE` of its rate. Its GPUs' crops come from other nodes, and are
  taken off first. EFA, over which NCCL may exchange gradients beside it, is not counted.
- DDP exchanges buckets of 25 MiB as the backward pass makes them, beside `OVERLAPPED` of the step. What takes longer is
  waited for, and so is the last bucket in any case.
- Each bucket, and the sums of loss and centre, take 2 log2(n) hops of `HOP_SECONDS`, which are not overlapped.

Straggling workers, a shared network and slow images are not counted.
"""

import math
from typing import NamedTuple

from dinoray.pipeline.planning.node_rates import LINK_SHARE
from dinoray.pipeline.planning.prices import NodeType

BUCKET_BYTES = 25 * 2**20
"""DDP's default."""
NODE_BYTES_PER_SECOND = 16e9
"""Between GPUs of one node, over PCIe 4: NVLink is faster."""
OVERLAPPED = 0.5
"""Share of a step in which gradients are made: of the products of 2 x 224 + 8 x 96 px, the backward has more."""
HOP_SECONDS = 20e-6


class Scaled(NamedTuple):
    """A step on `gpus` GPUs."""

    gpus: int
    exchange_seconds: float
    waited_seconds: float
    """The part of the exchange that no computation hides."""
    efficiency: float
    """Images/s of a GPU, divided by those of a GPU alone; 0 if the crops alone fill the link."""


def scaled(
    gpus: int, *, step_seconds: float, gradient_bytes: int, crop_bytes_per_second: float, node: NodeType
) -> Scaled:
    """Return the step of `gpus` GPUs on nodes of a type.

    `step_seconds`: of a GPU alone. `crop_bytes_per_second`: of the crops that a GPU trains on.
    """
    if gpus == 1:
        return Scaled(1, 0.0, 0.0, 1.0)
    rate = NODE_BYTES_PER_SECOND
    if gpus > node.gpus:
        rate = LINK_SHARE * node.gbit * 1e9 / 8 - node.gpus * crop_bytes_per_second
    if rate <= 0:
        return Scaled(gpus, math.inf, math.inf, 0.0)
    passed = 2 * (gpus - 1) / gpus * gradient_bytes
    collectives = math.ceil(gradient_bytes / BUCKET_BYTES) + 1
    exchange = passed / rate
    last = exchange * min(1.0, BUCKET_BYTES / gradient_bytes)
    waited = max(exchange - OVERLAPPED * step_seconds, last)
    waited += collectives * 2 * math.ceil(math.log2(gpus)) * HOP_SECONDS
    return Scaled(gpus, exchange, waited, step_seconds / (step_seconds + waited))
