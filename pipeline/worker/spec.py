"""Arguments of a train worker: one value, sent from the driver to each worker. See worker/worker.py."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ray import ObjectRef

from dinoray.models.published.checkpoint import Weights
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.cost import CostConfig
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig, ProbeConfig
from dinoray.pipeline.evaluation.published import Preprocessing
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.storage.lease_keeper import Fence
from dinoray.pipeline.stream.ray_data import StreamPlan
from dinoray.pipeline.stream.shared_stream import SharedStream
from dinoray.pipeline.tracking.config import LogConfig, TrackConfig
from dinoray.pipeline.training.config import CheckpointConfig, DINOConfig, HealthConfig, InitConfig


@dataclass(frozen=True)
class WorkerSpec:
    """All arguments of a train worker; the same for each worker."""

    name: str
    """The run's name in gauges and trackers."""
    run: Directory
    """Its reads and writes wait for the storage."""
    channel: RunChannel
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
    resources: ResourcesConfig
    init: InitConfig
    init_weights: "ObjectRef[Weights] | None"
    published: Preprocessing | None
    """What the initial weights were published with, if they were; the start is also evaluated with it."""
    pictures: "ObjectRef[list[tuple[str, NDArray[np.uint8]]]]"
    eval_sources: "tuple[ObjectRef[Source], ObjectRef[Source]] | None"
    num_images: int
    give_up_after_seconds: float
    """How long a read or a write waits for the storage."""
    max_bad_fraction: float
    prefetch_batches: int
    can_restart: bool
    shared: SharedStream | None = None
    """The shared stream that the run uses; None: a stream of its own."""
    fence: Fence | None = None
    """Checked before the workers write into the run directory; None: nothing keeps two drivers apart."""
    waits_for_decision: bool = False
    """If True, the workers wait after each evaluation for the decision, on the channel, to continue or end."""

    @property
    def starts_from_weights(self) -> bool:
        """Whether the run starts from trained weights, not random ones."""
        return self.init.path is not None or self.config.backbone.pretrained

    @property
    def has_scores(self) -> bool:
        """Whether evaluations of the run have scores."""
        return self.eval_sources is not None or self.eval.label_free

    def check_fence(self, *, is_strict: bool = False) -> None:
        """Raise LostLeaseError, and end the run with it, if the run directory is another driver's by now.

        `is_strict` as in Fence.check.
        """
        if self.fence is None:
            return
        try:
            self.fence.check(is_strict=is_strict)
        except LostLeaseError as error:
            self.channel.post_fatal(error)
            raise
