"""How many train workers Ray Train starts, where their number may change, and how often it starts them again.

Ray Train's own policy of numbers takes any number between the limits, also one that does not divide the batch; right
after a loss it counts the lost node for minutes, and so waits for workers that cannot start; and where there is room
for more workers it ends those that train at once, with what they did since the last checkpoint. It also tries the same
number again and again where something that Ray Train does not know of takes the room. Its policy of failures counts
those of days as if they had followed one another. The policies here are Ray's with these changes. Where their classes
are missing, Ray's own are used as they are, and a number of workers that does not divide the batch ends the run. The
same in Ray 2.58.1, 2.59.0 and 2.60.0.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ray.train.torch import TorchTrainer

from dinoray.pipeline.ray_private.nodes import staying_nodes

try:
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
except ImportError:
    DefaultFailurePolicy = ElasticScalingPolicy = None

_AGAIN_SECONDS = 1800.0
"""Before a number of workers is tried again that did not start, on the same nodes: each try takes a minute or two of
training."""


class Trainer(TorchTrainer):
    """A TorchTrainer of as many workers as there is room for, of the numbers in `sizes`.

    All calls are made in the controller's process. `grows` is called with the number of workers that train and a larger
    one for which there is room: to change it is the caller's business. Failures between which what `progress` returns
    has changed do not add up.
    """

    def __init__(
        self,
        *args: Any,
        sizes: Collection[int],
        grows: Callable[[int, int], None],
        progress: Callable[[], object],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._sizes, self._grows, self._progress = sorted(sizes), grows, progress

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if ElasticScalingPolicy is not None:
            if isinstance(arguments.get("scaling_policy"), ElasticScalingPolicy):
                arguments["scaling_policy"] = _scaling_policy(self.scaling_config, self._sizes, self._grows)
            if type(arguments.get("failure_policy")) is DefaultFailurePolicy:
                arguments["failure_policy"] = _failure_policy(self.run_config.failure_config, self._progress)
        return super()._initialize_and_run_controller(**arguments)


def _failure_policy(failure_config: Any, progress: Callable[[], object]) -> Any:
    class Policy(DefaultFailurePolicy):
        _seen: object = None

        def make_decision(self, training_failed_error: Any) -> Any:
            seen = progress()
            if seen != self._seen:
                self._seen = seen
                self._worker_group_failures = self._controller_failures = 0
            return super().make_decision(training_failed_error)

    return Policy(failure_config)


def _staying() -> set[str]:
    return {node["NodeID"] for node in staying_nodes()}


def _scaling_policy(scaling_config: Any, sizes: list[int], grows: Callable[[int, int], None]) -> Any:
    class Policy(ElasticScalingPolicy):
        _starting: int | None = None
        """The number of workers that were to start and have not been seen to train."""

        def __init__(self) -> None:
            super().__init__(scaling_config)
            self._failed: dict[int, tuple[float, set[str]]] = {}
            """Number of workers that did not start -> when that was, and the nodes that there were."""

        def _count_possible_workers(self, reserved: Any) -> int:
            there = _staying()
            if isinstance(reserved, Mapping):  # in Ray 2.58 a list, which does not name nodes
                reserved = {node: has for node, has in reserved.items() if node in there}
            room, since = super()._count_possible_workers(reserved), time.monotonic() - _AGAIN_SECONDS

            def may_start(number: int) -> bool:
                failed, nodes = self._failed.get(number, (since, there))
                # The least number is not given up: there is no other. A node that has joined since may be the room.
                return number == sizes[0] or failed <= since or not there <= nodes

            return max((n for n in sizes if n <= room and may_start(n)), default=0)

        def make_decision_for_non_running_worker_group(self) -> Any:
            if self._starting is not None:
                self._failed[self._starting] = time.monotonic(), _staying()
            decision = super().make_decision_for_non_running_worker_group()
            self._starting = getattr(decision, "num_workers", None)
            return decision

        def make_decision_for_running_worker_group(
            self, worker_group_state: Any, worker_group_status: Any
        ) -> Any:
            self._starting = None
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            now, then = worker_group_state.num_workers, getattr(decision, "num_workers", 0)
            if then > now:
                grows(now, then)
            return NoopDecision()

    return Policy()
