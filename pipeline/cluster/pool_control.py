"""Ray Data callback that resizes the augment actor pool to the size that pool_size.py decides on.

stream/ray_data.py installs it. Ray calls the hooks of an execution callback on its executor's thread, in the
process of the train worker of rank 0. The pool's minimum and maximum are set to the size, and Ray starts or
stops actors. Ray's autoscaler starts nodes for the actors that do not fit.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray

from dinoray.models.errors import one_line
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox
from dinoray.pipeline.cluster.pool_size import Actors, PoolSize, TrainerReading
from dinoray.pipeline.ray_private import data as private

_EVERY_SECONDS = 1.0
_RESERVED_SECONDS = 180.0
_RENEWED_SECONDS = 60.0
_NODE_LABEL = "ray.io/node-id"


class DrainPolicy(private.BackpressurePolicy):
    """Backpressure policy of Ray Data that gives less work to a pool that is too large.

    Ray stops only idle actors, and no actor is idle while Ray gives all of them blocks that are not yet
    consumed. Method names are Ray's.
    """

    name = "Drain"

    def __init__(self, *_: Any) -> None:
        pass

    def can_add_input(self, operator: Any) -> bool:
        """Return True if the operator may start one more block."""
        return all(
            pool.num_running_actors() <= pool.max_size() or pool.num_tasks_in_flight() < pool.max_size()
            for pool in operator.get_autoscaling_actor_pools()
        )

    def max_task_output_bytes_to_read(self, operator: Any) -> int | None:
        """Return None: this policy sets no limit."""
        return None


class Reservation(NamedTuple):
    """Resources to request for a pool: one bundle and one node label selector per actor."""

    resources: list[dict[str, float]]
    label_selectors: list[dict[str, str]]


def reservation(pool: Any, target: int) -> Reservation:
    """Return bundles for `target` actors: running actors on their own nodes, missing actors on any node.

    Ray's autoscaler keeps every node on which a request fits, even an idle one, in addition to the nodes in
    use. Requests for running actors without a node label would therefore keep idle nodes for ever.
    """
    there = [{_NODE_LABEL: node} for node in private.nodes_of_actors(pool)]
    to_come = max(0, target - len(there))
    bundle = {"CPU": pool.per_actor_resource_usage().cpu}
    return Reservation([bundle] * (len(there) + to_come), there + [{}] * to_come)


def not_resized(why: str) -> str:
    """Return the warning that the pool is left to the rules of Ray Data."""
    return (
        f"warning: the pool of augment actors cannot be resized with Ray {ray.__version__} ({why}); "
        "set resources.augment_actors to one number"
    )


class PoolControl(private.ExecutionCallback):
    """Execution callback of Ray Data; its hooks have Ray's names.

    If this version of Ray lacks a private name that `ray_private.data` uses, the pool keeps its size and a
    warning is posted: an error in a hook would end the stream.
    """

    def __init__(self, channel: RunChannel, size: PoolSize) -> None:
        self._channel, self._mailbox, self._size = channel, PoolMailbox(channel), size
        self._next = 0.0
        self._is_able = True
        self._answer: ray.ObjectRef[TrainerReading | None] | None = None
        self._reserved, self._reserved_at = Reservation([], []), -math.inf

    def before_execution_starts(self, executor: Any) -> None:
        """Disable Ray's own node requests, which grow with a stream and never shrink.

        `_reserve` replaces them.
        """
        self._try(lambda: private.stop_requests(executor))

    def on_execution_step(self, executor: Any) -> None:
        """Once a second, send the pool's state to the mailbox, get the trainer's reading and set the size."""
        now = time.time()  # wall time, which is valid in the next leg's process too, on any node
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
            self._channel.post("note", text=not_resized(one_line(error)))

    def _step(self, executor: Any, now: float) -> None:
        for pool in private.pools(executor):
            lost = pool.num_restarting_actors()  # lost with their node; Ray counts them as running
            actors = Actors(pool.num_running_actors() - lost, pool.num_pending_actors() + lost)
            self._size.observe(actors, now)
            self._listen(now)
            size = self._size.target
            private.resize(pool, size)
            self._reserve(executor, reservation(pool, size), now)
            if self._answer is None:
                self._mailbox.send_state(actors, self._size)
                self._answer = self._mailbox.collect_reading()

    def _reserve(self, executor: Any, wanted: Reservation, now: float) -> None:
        """Reserve the pool's resources for this stream. The request is renewed before it expires."""
        if wanted == self._reserved and now < self._reserved_at + _RENEWED_SECONDS:
            return
        self._reserved, self._reserved_at = wanted, now
        private.request_nodes(executor, *wanted, expire_after_seconds=_RESERVED_SECONDS)

    def _listen(self, now: float) -> None:
        if self._answer is None or not ray.wait([self._answer], timeout=0)[0]:
            return
        reading, self._answer = ray.get(self._answer), None
        if reading is None:
            return
        self._size.adjust(reading, now)
        if self._size.note:
            self._channel.post("note", text=self._size.note)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Do nothing; Ray calls this hook."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Do nothing; Ray calls this hook."""
