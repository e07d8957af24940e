"""The one channel from the workers to the driver: what to show a person, and errors that end the run.

An actor without CPUs that lives as long as its driver. Training never waits for it: posts are not awaited,
but for a fatal error, which is delivered before the worker dies of it.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.exceptions

from models.settings import DinorayError


@dataclass(frozen=True)
class Event:
    """One thing that happened: `kind` and its facts."""

    kind: Literal["step", "eval", "checkpoint", "note", "fatal"]
    facts: dict[str, Any]


class _Events:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._claims: Counter[str] = Counter()

    async def post(self, event: Event) -> None:
        self._queue.put_nowait(event)

    async def claim(self, what: str) -> int:
        self._claims[what] += 1
        return self._claims[what]

    async def take(self, timeout_seconds: float) -> Event | None:
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_seconds)
        except asyncio.TimeoutError:
            return None


class Board:
    """Handle to the channel; picklable."""

    def __init__(self) -> None:
        self._actor = ray.remote(num_cpus=0)(_Events).remote()

    def post(self, kind: Literal["step", "eval", "checkpoint", "note"], **facts: Any) -> None:
        """Send without waiting."""
        self._actor.post.remote(Event(kind, facts))

    def post_last_words(self, text: str) -> None:
        """Send a note of a worker that is about to die; returns when it, and all posted before it, has arrived."""
        ray.get(self._actor.post.remote(Event("note", {"text": text})))

    def post_fatal(self, message: str, exit_code: int) -> None:
        """Send an error that ends the run; returns when it has arrived."""
        ray.get(self._actor.post.remote(Event("fatal", {"message": message, "exit_code": exit_code})))

    def claim(self, what: str) -> int:
        """How many times, with this one, `what` was asked for since the driver started: 1 for the first."""
        return ray.get(self._actor.claim.remote(what))

    def take(self, *, timeout_seconds: float) -> Event | None:
        """The next event, or None after `timeout_seconds`."""
        return ray.get(self._actor.take.remote(timeout_seconds))


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
