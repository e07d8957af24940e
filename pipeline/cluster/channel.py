"""The message channel of a run: events to display, fatal errors, requests to end, decisions, shared values.

It is an actor without CPUs that lives as long as its driver. Training does not wait for posts, except for a
fatal error and a worker's last post, which arrive before the worker ends. In a study, workers also wait after
an evaluation for the decision to continue or end the trial.
"""

import asyncio
import pickle
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinoray.models.errors import DinorayError

_OUTAGE_SECONDS = 60.0
"""Least time between the beginnings of two outages that are posted."""

NEWEST_CHECKPOINT = "newest checkpoint"
"""Name under which the channel keeps the step of the checkpoint that was written last; None before the first."""

UNCHECKED_READS = "unchecked reads"
"""Name under which the channel keeps the number of `note_unchecked`; None before the first."""

Kind = Literal["placed", "step", "eval", "checkpoint", "note", "stopped", "lost", "resumed"]


@dataclass(frozen=True)
class Event:
    """One event: its kind and its data."""

    kind: Kind | Literal["fatal"]
    facts: dict[str, Any]


@dataclass(frozen=True)
class EndRequest:
    """The train workers are to end after the step that they are at, with a checkpoint."""

    restart: str | None = None
    """Why they start again after it; None: the run stops."""


class _RunChannelActor:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._fatal: Event | None = None
        self._claims: Counter[str] = Counter()
        self._answers: defaultdict[int, asyncio.Future[bool]] = defaultdict(asyncio.Future)
        self._end: EndRequest | None = None
        self._is_requested = asyncio.Event()
        self._in_outage, self._outage_posted = False, -_OUTAGE_SECONDS
        self._values: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}

    async def post(self, event: Event) -> None:
        if event.kind == "fatal":
            self._fatal = self._fatal or event
        if event.kind == "lost" and self._end is not None and self._end.restart is not None:
            self._end = None  # they start again, for this or another reason
            self._is_requested.clear()
        if event.kind == "checkpoint":
            self._values[NEWEST_CHECKPOINT] = event.facts["step"]
        self._queue.put_nowait(event)

    async def fatal(self) -> Event | None:
        return self._fatal

    async def note_outage(self, text: str, is_over: bool) -> None:
        if is_over is not self._in_outage:
            return  # another process has posted it
        now = time.monotonic()
        if not is_over and now - self._outage_posted < _OUTAGE_SECONDS:
            return
        self._in_outage, self._outage_posted = not is_over, self._outage_posted if is_over else now
        self._queue.put_nowait(Event("note", {"text": text}))

    async def note_unchecked(self, count: int, line: str) -> None:
        before = self._values.get(UNCHECKED_READS, 0)
        self._values[UNCHECKED_READS] = before + count
        if not before:
            self._queue.put_nowait(Event("note", {"text": line}))

    async def put(self, name: str, value: Any) -> None:
        self._values[name] = value

    async def merge(self, name: str, values: dict[Any, Any]) -> None:
        self._values[name] = self._values.get(name, {}) | values

    async def get(self, name: str) -> Any:
        return self._values.get(name)

    async def add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    async def collect(self, name: str) -> Any:
        return self._sums.pop(name, None)

    async def claim(self, what: str) -> int:
        self._claims[what] += 1
        return self._claims[what]

    async def request_end(self, request: EndRequest) -> None:
        if self._end is None or request.restart is None:
            self._end = request
        self._is_requested.set()

    async def end_request(self) -> EndRequest:
        while self._end is None:
            await self._is_requested.wait()
        return self._end

    async def answer(self, step: int, go_on: bool) -> None:
        if not self._answers[step].done():  # after lost workers restart, a step is decided a second time
            self._answers[step].set_result(go_on)

    async def decision(self, step: int) -> bool:
        return await self._answers[step]

    async def take(self, timeout_seconds: float) -> Event | None:
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_seconds)
        except asyncio.TimeoutError:
            return None


class RunChannel:
    """Picklable handle to the channel."""

    def __init__(self) -> None:
        self._actor = actor_here(_RunChannelActor)

    def post(self, kind: Kind, **facts: Any) -> None:
        """Send an event without waiting."""
        self._actor.post.remote(Event(kind, facts))

    def post_and_wait(self, kind: Kind, **facts: Any) -> None:
        """Send a worker's last event; return once it and all events posted before have arrived."""
        ray.get(self._actor.post.remote(Event(kind, facts)))

    def post_fatal(self, error: DinorayError) -> None:
        """Send an error that ends the run; return once it has arrived."""
        # As bytes, so that the actor, which only forwards the error, need not import the module that defines
        # it.
        ray.get(self._actor.post.remote(Event("fatal", {"error": pickle.dumps(error)})))

    def posted_error(self) -> DinorayError | None:
        """Return the first error that `post_fatal` sent since the driver started; None if there is none."""
        event = ray.get(self._actor.fatal.remote())
        return event and fatal_error(event)

    def note_outage(self, text: str, is_over: bool) -> None:
        """Send a line about the storage, without waiting; one line stands for those of all processes."""
        self._actor.note_outage.remote(text, is_over)

    def note_unchecked(self, count: int, line: str) -> None:
        """Add to the reads that nothing checked, without waiting; the first line of all is posted."""
        self._actor.note_unchecked.remote(count, line)

    def request_end(self, request: EndRequest) -> None:
        """Request the workers to end, without waiting. A stop takes the place of a restart, not the reverse."""
        self._actor.request_end.remote(request)

    def end_request(self) -> "ray.ObjectRef[EndRequest]":
        """A future result: the request to end, once there is one."""
        return self._actor.end_request.remote()

    def answer(self, step: int, *, go_on: bool) -> None:
        """Send the waiting workers the decision after the evaluation at `step`: continue or end."""
        self._actor.answer.remote(step, go_on)

    def decision(self, step: int) -> bool:
        """Wait for the decision after the evaluation at `step`: True to continue."""
        return ray.get(self._actor.decision.remote(step))

    def claim(self, what: str) -> int:
        """Count the claims of `what` since the driver started and return the count: 1 for the first claim."""
        return ray.get(self._actor.claim.remote(what))

    def put(self, name: str, value: Any) -> None:
        """Keep a value under `name` for all processes, without waiting."""
        self._actor.put.remote(name, value)

    def merge(self, name: str, values: dict[Any, Any]) -> None:
        """Put `values` into the dict under `name`, which begins empty, without waiting."""
        self._actor.merge.remote(name, values)

    def get(self, name: str) -> Any:
        """Return the value last put under `name`; None if there is none."""
        return ray.get(self.look_up(name))

    def look_up(self, name: str) -> "ray.ObjectRef[Any]":
        """As `get`, without waiting: a future result."""
        return self._actor.get.remote(name)

    def add(self, name: str, value: Any) -> None:
        """Add a value to the sum under `name`, without waiting."""
        self._actor.add.remote(name, value)

    def collect(self, name: str) -> "ray.ObjectRef[Any]":
        """Take the sum under `name`: the future result is None if nothing was added since the last call."""
        return self._actor.collect.remote(name)

    def take(self, *, timeout_seconds: float) -> Event | None:
        """Return the next event, or None after `timeout_seconds`."""
        return ray.get(self._actor.take.remote(timeout_seconds))


def actor_here(cls: type, *arguments: Any, **options: Any) -> Any:
    """Start an actor without CPUs on this process's node, since any other node may be lost before it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(cls).remote(*arguments)


def fatal_error(event: Event) -> DinorayError:
    """Return the original error of a `fatal` event."""
    error: DinorayError = pickle.loads(event.facts["error"])
    return error


def known_error(error: BaseException | None) -> DinorayError | None:
    """Return the DinorayError that `error` is or was caused by, without Ray's wrapping; else None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray wraps a task's error in a subclass of its class, and the text of that error is the whole
        # traceback.
        if isinstance(error, DinorayError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
