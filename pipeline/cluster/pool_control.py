"""Ray Data callback that resizes the augment actor pools to the size that pool_size.py decides on.

stream/ray_data.py installs it. Ray calls the hooks of an execution callback on its executor's thread, in the
process of the train worker of rank 0. The pool's minimum and maximum are set to the size, and Ray starts or
stops actors. Ray's autoscaler starts nodes for the actors that do not fit.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray

from dinoray.models.errors import one_line
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox, PoolPlan
from dinoray.pipeline.cluster.pool_size import Actors, divide_work, share_actors
from dinoray.pipeline.cluster.stalls import Flow
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
    """Execution callback of Ray Data for the pool of one stream; its hooks have Ray's names.

    There is one plan for the pools of all streams: their size together, of which each has a share. The control of the
    first stream, which is of this class, makes it. It must be one decision: all train workers wait for the slowest
    stream at each step, so the data wait that they measure is that of the run, and more actors for one stream alone
    bring nothing until the others have more too. Shares are by the work of the streams, so that all are equally fast:
    by the number of train workers that each serves (`ranks`), and the CPU time of an image on the nodes of its actors.

    If this version of Ray lacks a private name that `ray_private.data` uses, the pool keeps its size and a
    warning is posted: an error in a hook would end the stream.
    """

    def __init__(
        self, channel: RunChannel, plan: PoolPlan, ranks: Sequence[int] = (1,), stream: int = 0
    ) -> None:
        self._channel, self._mailbox, self._plan = channel, PoolMailbox(channel), plan
        self._ranks, self._stream = ranks, stream
        self._next = 0.0
        self._is_able = True
        self._answers: list[ray.ObjectRef[Any]] = []
        self._others: Mapping[int, Actors] = {}
        self._reserved, self._reserved_at = Reservation([], []), -math.inf

    def before_execution_starts(self, executor: Any) -> None:
        """Disable Ray's own node requests, which grow with a stream and never shrink.

        `_reserve` replaces them.
        """
        self._try(lambda: private.stop_requests(executor))

    def on_execution_step(self, executor: Any) -> None:
        """Once a second, send the pool's state to the mailbox, get the answers and set the size."""
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
            self._observe(actors, now)
            self._listen(now)
            share = share_actors(self._plan.size.target, self._plan.work)[self._stream]
            private.resize(pool, share)
            self._reserve(executor, reservation(pool, share), now)
            if not self._answers:
                self._mailbox.send_actors(self._stream, actors)
                flow = Flow(actors.running, actors.pending, *private.flow(executor))
                self._mailbox.send_flow(self._stream, flow)
                self._answers = self._ask()

    def _reserve(self, executor: Any, wanted: Reservation, now: float) -> None:
        """Reserve the pool's resources for this stream. The request is renewed before it expires."""
        if wanted == self._reserved and now < self._reserved_at + _RENEWED_SECONDS:
            return
        self._reserved, self._reserved_at = wanted, now
        private.request_nodes(executor, *wanted, expire_after_seconds=_RESERVED_SECONDS)

    def _listen(self, now: float) -> None:
        asked = len(self._answers)
        if asked and len(ray.wait(self._answers, num_returns=asked, timeout=0)[0]) == asked:
            answers, self._answers = ray.get(self._answers), []
            self._hear(answers, now)

    def _observe(self, actors: Actors, now: float) -> None:
        """Record the actors of all pools. A pool that has sent none yet counts as one pending actor."""
        of_stream = {**self._others, self._stream: actors}
        self._plan.size.observe(
            Actors(
                sum(of_pool.running for of_pool in of_stream.values()),
                sum(of_pool.pending for of_pool in of_stream.values()) + len(self._ranks) - len(of_stream),
            ),
            now,
        )

    def _ask(self) -> "list[ray.ObjectRef[Any]]":
        self._mailbox.send_plan(self._plan)
        return [self._mailbox.collect_reading(), self._mailbox.actors(), self._mailbox.work()]

    def _hear(self, answers: Sequence[Any], now: float) -> None:
        reading, self._others, cpu_ms = answers
        self._plan = self._plan._replace(work=divide_work(self._plan.work, self._ranks, cpu_ms or {}))
        if reading is None:
            return
        self._plan.size.adjust(reading, now)
        if self._plan.size.note:
            self._channel.post("note", text=self._plan.size.note)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Do nothing; Ray calls this hook."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Do nothing; Ray calls this hook."""


class PoolFollower(PoolControl):
    """The control of another stream's pool, which follows the plan of the first one."""

    def _observe(self, actors: Actors, now: float) -> None:
        pass

    def _ask(self) -> "list[ray.ObjectRef[Any]]":
        return [self._mailbox.plan()]

    def _hear(self, answers: Sequence[Any], now: float) -> None:
        (plan,) = answers
        self._plan = plan or self._plan
