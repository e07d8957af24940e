"""The one channel between the workers and the driver: what to show a person, errors that end the run, and its end.

An actor without CPUs that lives as long as its driver. Training never waits for it: posts are not awaited,
but for a fatal error, which is delivered before the worker dies of it, and the answer after an evaluation where a
study decides whether the run goes on.
"""

import asyncio
import pickle
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from models.errors import DinorayError
from pipeline.cluster.pool_size import PoolSize, Reading

Kind = Literal["placed", "step", "eval", "checkpoint", "note", "stopped"]


@dataclass(frozen=True)
class Event:
    """One thing that happened: `kind` and its facts."""

    kind: Kind | Literal["fatal"]
    facts: dict[str, Any]


class _Events:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._claims: Counter[str] = Counter()
        self._answers: defaultdict[int, asyncio.Future[bool]] = defaultdict(asyncio.Future)
        self._stop = False
        self._pool: dict[str, int] = {}
        self._pool_size: PoolSize | None = None
        self._unheard = Reading()

    async def post(self, event: Event) -> None:
        self._queue.put_nowait(event)

    async def tell_pace(self, reading: Reading) -> None:
        self._unheard += reading

    async def tell_pool(self, pool: dict[str, int], size: PoolSize) -> Reading:
        self._pool, self._pool_size = pool, size
        unheard, self._unheard = self._unheard, Reading()
        return unheard

    async def pool(self) -> dict[str, int]:
        return self._pool

    async def pool_size(self) -> PoolSize | None:
        return self._pool_size

    async def claim(self, what: str) -> int:
        self._claims[what] += 1
        return self._claims[what]

    async def stop(self) -> None:
        self._stop = True

    async def answer(self, step: int, go_on: bool) -> None:
        if not self._answers[step].done():  # a step that was lost with its workers is asked for again
            self._answers[step].set_result(go_on)

    async def goes_on(self, step: int | None) -> bool:
        return not self._stop and (step is None or await self._answers[step])

    async def take(self, timeout_seconds: float) -> Event | None:
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_seconds)
        except asyncio.TimeoutError:
            return None


class Board:
    """Handle to the channel; picklable."""

    def __init__(self) -> None:
        self._actor = actor_here(_Events)

    def post(self, kind: Kind, **facts: Any) -> None:
        """Send without waiting."""
        self._actor.post.remote(Event(kind, facts))

    def post_last(self, kind: Kind, **facts: Any) -> None:
        """Send what a worker that is about to end has to say; returns when it, and all posted before, has arrived."""
        ray.get(self._actor.post.remote(Event(kind, facts)))

    def post_fatal(self, error: DinorayError) -> None:
        """Send an error that ends the run; returns when it has arrived."""
        # As bytes: the actor, which only hands it on, then need not import what defines the error.
        ray.get(self._actor.post.remote(Event("fatal", {"error": pickle.dumps(error)})))

    def stop(self) -> None:
        """Ask the workers to end the run at the next step that they log, with a checkpoint."""
        ray.get(self._actor.stop.remote())

    def answer(self, step: int, *, go_on: bool) -> None:
        """Tell the workers, who wait for it, whether to go on after the evaluation at `step`."""
        self._actor.answer.remote(step, go_on)

    def goes_on(self, step: int | None) -> bool:
        """Whether the run goes on: no stop was asked for, and the answer for `step`, if given, says so.

        Returns when that answer is there.
        """
        return ray.get(self._actor.goes_on.remote(step))

    def claim(self, what: str) -> int:
        """How many times, with this one, `what` was asked for since the driver started: 1 for the first."""
        return ray.get(self._actor.claim.remote(what))

    def tell_pace(self, reading: Reading) -> None:
        """Say what the trainer did since this was last called; the pool asks for it."""
        self._actor.tell_pace.remote(reading)

    def tell_pool(self, pool: dict[str, int], size: PoolSize) -> "ray.ObjectRef[Reading]":
        """Say how the pool of augment actors stands; the answer is what the trainer read since this was last called."""
        return self._actor.tell_pool.remote(pool, size)

    def pool(self) -> dict[str, int]:
        """`running`, `pending` and `target` of the augment actors, as told last; empty before that."""
        return ray.get(self._actor.pool.remote())

    def pool_size(self) -> PoolSize | None:
        """What decides on the pool's size, as told last: the next leg's pool goes on with it."""
        return ray.get(self._actor.pool_size.remote())

    def take(self, *, timeout_seconds: float) -> Event | None:
        """The next event, or None after `timeout_seconds`."""
        return ray.get(self._actor.take.remote(timeout_seconds))


def actor_here(cls: type, *arguments: Any, **options: Any) -> Any:
    """An actor without CPUs on this process's own node: another one may be lost while this process lives."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(cls).remote(*arguments)


def fatal_error(event: Event) -> DinorayError:
    """The error that a `fatal` event tells of, as it was where it happened."""
    error: DinorayError = pickle.loads(event.facts["error"])
    return error


def known_error(error: BaseException | None) -> DinorayError | None:
    """The error of ours that `error` is or was caused by, through Ray's wrapping."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray wraps a task's error in a class derived from it, whose text is the whole traceback.
        if isinstance(error, DinorayError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
