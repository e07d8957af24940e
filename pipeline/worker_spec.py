"""What a train worker is told: one value, from the driver to each of them. See pipeline/worker.py."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ray import ObjectRef

from models.interop import Weights
from pipeline.board import Board
from pipeline.checkpoint import CheckpointConfig
from pipeline.cost import CostConfig
from pipeline.dataset import StreamPlan
from pipeline.features import EvalConfig
from pipeline.health import HealthConfig
from pipeline.metrics import LogConfig
from pipeline.probes import ProbeConfig
from pipeline.shared_stream import SharedStream
from pipeline.source import Source
from pipeline.start import InitConfig
from pipeline.storage import Directory
from pipeline.tracking import TrackConfig
from pipeline.training import DINOConfig


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to know; sent to each."""

    name: str
    """What gauges and trackers call the run."""
    run: Directory
    board: Board
    config: DINOConfig
    stream: StreamPlan
    checkpoint: CheckpointConfig
    log: LogConfig
    track: TrackConfig
    params: Mapping[str, object]
    """Settings by dotted key, for trackers."""
    eval: EvalConfig
    probe: ProbeConfig
    health: HealthConfig
    cost: CostConfig
    init: InitConfig
    init_weights: "ObjectRef[Weights] | None"
    pictures: "ObjectRef[list[tuple[str, NDArray[np.uint8]]]]"
    eval_sources: "tuple[ObjectRef[Source], ObjectRef[Source]] | None"
    num_images: int
    max_bad_fraction: float
    prefetch_batches: int
    can_restart: bool
    shared: SharedStream | None = None
    """The stream to take part in; None: one of its own."""
    asks: bool = False
    """Whether, after each evaluation, the workers wait on the board to be told if they go on."""
