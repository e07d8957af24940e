"""Brings Ray Data's pool of augment actors to the size that pool_size.py decides on. See stream/ray_data.py, which
asks for it.

Ray calls the hooks of an execution callback on its executor's thread, beside the train worker of rank 0. The pool's
least and most are set to the size, and Ray does the rest: actors that find no place are what its autoscaler starts
nodes for.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import ray

from models.errors import one_line
from pipeline.cluster.channel import Board
from pipeline.cluster.pool_size import Actors, PoolSize, Reading
from pipeline.ray_private import data as private

_EVERY_SECONDS = 1.0
_RESERVED_SECONDS = 180.0
_RENEWED_SECONDS = 60.0
_NODE_LABEL = "ray.io/node-id"


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


class Reservation(NamedTuple):
    """What is asked for of the cluster for a pool, a bundle and its node's label for each actor."""

    resources: list[dict[str, float]]
    label_selectors: list[dict[str, str]]


def reservation(pool: Any, target: int) -> Reservation:
    """Of actors that run, each on its own node; of those that are still to come, anywhere.

    Ray's autoscaler keeps what is asked for on whichever nodes it fits, be they idle, and the nodes at work beside
    them: asked for without a node, it would keep idle ones for ever.
    """
    there = [{_NODE_LABEL: node} for node in private.nodes_of_actors(pool)]
    to_come = max(0, target - len(there))
    bundle = {"CPU": pool.per_actor_resource_usage().cpu}
    return Reservation([bundle] * (len(there) + to_come), there + [{}] * to_come)


def not_resized(why: str) -> str:
    """The warning that the pool keeps to the rules of Ray Data."""
    return (
        f"warning: the pool of augment actors cannot be resized with Ray {ray.__version__} ({why}); "
        "set resources.augment_actors to one number"
    )


class PoolControl:
    """An execution callback of Ray Data, by its hooks' names.

    With a Ray that has other private names than `ray_private.data` uses, the pool stays as it is and a warning is
    posted: an error in a hook would end the stream.
    """

    def __init__(self, board: Board, size: PoolSize) -> None:
        self._board, self._size = board, size
        self._next = 0.0
        self._is_able = True
        self._answer: ray.ObjectRef[Reading] | None = None
        self._reserved, self._reserved_at = Reservation([], []), -math.inf

    def before_execution_starts(self, executor: Any) -> None:
        """Ray's own requests for nodes grow with a stream and are never taken back: ours stand in for them."""
        self._try(lambda: private.stop_requests(executor))

    def on_execution_step(self, executor: Any) -> None:
        """Every second: tell the board of the pool, take what it has of the trainer, set the pool's size."""
        now = time.time()  # which the next leg's process has too, on whichever node
        if now >= self._next:
            self._next = now + _EVERY_SECONDS
            self._try(lambda: self._step(executor, now))

    def _try(self, act: Callable[[], None]) -> None:
        if not self._is_able:
            return
        try:
            act()
        except private.MissingNameError as error:
            self._is_able = False
            self._board.post("note", text=not_resized(one_line(error)))

    def _step(self, executor: Any, now: float) -> None:
        for pool in private.pools(executor):
            lost = pool.num_restarting_actors()  # with their node; Ray counts them among the running
            actors = Actors(pool.num_running_actors() - lost, pool.num_pending_actors() + lost)
            self._size.see(actors, now)
            self._listen(now)
            size = self._size.target
            private.resize(pool, size)
            self._reserve(executor, reservation(pool, size), now)
            if self._answer is None:
                self._answer = self._board.tell_pool({**asdict(actors), "target": size}, self._size)

    def _reserve(self, executor: Any, wanted: Reservation, now: float) -> None:
        """Keep what the pool takes for this stream, beside others on the cluster; told again before it expires."""
        if wanted == self._reserved and now < self._reserved_at + _RENEWED_SECONDS:
            return
        self._reserved, self._reserved_at = wanted, now
        private.request_nodes(executor, *wanted, expire_after_seconds=_RESERVED_SECONDS)

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
