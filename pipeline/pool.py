"""Brings Ray Data's pool of augment actors to the size that pool_size.py decides on. See dataset.py, which asks for it.

Ray calls the hooks of an execution callback on its executor's thread, beside the train worker of rank 0. The pool's
least and most are set to the size, and Ray does the rest: actors that find no place are what its autoscaler starts
nodes for.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import ray

from pipeline.board import Board
from pipeline.pool_size import Actors, PoolSize, Reading

_EVERY_SECONDS = 1.0
_NEVER_USED = 1e9


def pool_metrics(pool: Mapping[str, int]) -> dict[str, float]:
    """`augment_actors` that run, and `augment_target`: how many should; nothing before the pool is told of."""
    return {"augment_actors": pool["running"], "augment_target": pool["target"]} if pool else {}


class DrainPolicy:
    """A backpressure policy of Ray Data, by its methods' names: a pool that is too large gets less to do.

    Ray lets only idle actors go, and there are none as long as it gives each of them blocks that nobody takes.
    """

    name = "Drain"

    def __init__(self, *_: Any) -> None:
        pass

    def can_add_input(self, operator: Any) -> bool:
        """Whether the operator may begin with one more block."""
        return all(
            pool.num_running_actors() <= pool.max_size() or pool.num_tasks_in_flight() < pool.max_size()
            for pool in operator.get_autoscaling_actor_pools()
        )

    def max_task_output_bytes_to_read(self, operator: Any) -> int | None:
        """No limit of its own."""
        return None


class PoolControl:
    """An execution callback of Ray Data, by its hooks' names."""

    def __init__(self, board: Board, low: int, high: int, start: int, cool_down_seconds: float) -> None:
        self._board = board
        self._size = PoolSize(low, high, target=start, cool_down_seconds=cool_down_seconds)
        self._next = 0.0
        self._answer: ray.ObjectRef[Reading] | None = None

    def before_execution_starts(self, executor: Any) -> None:
        """Ray's own requests for nodes grow with a stream and are never taken back: from here on they are the pool's.

        Ray repeats the last one as long as the cluster is used less than this.
        """
        used = getattr(executor._cluster_autoscaler, "_cluster_scaling_up_util_threshold", None)
        # RAY_DATA_CLUSTER_AUTOSCALER may name another autoscaler, where this is no such thing.
        if is_dataclass(used) and not isinstance(used, type):
            never = dict.fromkeys(asdict(used), _NEVER_USED)
            executor._cluster_autoscaler._cluster_scaling_up_util_threshold = replace(used, **never)

    def on_execution_step(self, executor: Any) -> None:
        """Every second: tell the board of the pool, take what it has of the trainer, set the pool's size."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY_SECONDS
        for pool in (
            pool for operator in executor._topology for pool in operator.get_autoscaling_actor_pools()
        ):
            lost = pool.num_restarting_actors()  # with their node; Ray counts them among the running
            actors = Actors(pool.num_running_actors() - lost, pool.num_pending_actors() + lost)
            self._size.see(actors, now)
            self._listen(now)
            size = self._size.target
            pool._config = replace(pool._config, min_size=size, initial_size=size, max_size=size)
            # What is reserved for this stream beside others on the cluster.
            bundle = {"CPU": pool.per_actor_resource_usage().cpu}
            executor._cluster_autoscaler._last_resource_request = [bundle] * size
            if self._answer is None:
                self._answer = self._board.tell_pool({**asdict(actors), "target": size})

    def _listen(self, now: float) -> None:
        if self._answer is None or not ray.wait([self._answer], timeout=0)[0]:
            return
        reading, self._answer = ray.get(self._answer), None
        if not reading.seconds:
            return
        self._size.heed(reading, now)
        if self._size.note:
            self._board.post("note", text=self._size.note)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing is left to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing is left to do."""
