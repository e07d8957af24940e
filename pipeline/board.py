"""The one channel from the workers to the driver: what to show a person, and errors that end the run.

An actor without CPUs that lives as long as its driver. Training never waits for it: posts are not awaited,
but for a fatal error, which is delivered before the worker dies of it.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

import ray


@dataclass(frozen=True)
class Event:
    """One thing that happened: `kind` and its facts."""

    kind: Literal["step", "eval", "checkpoint", "note", "fatal"]
    facts: dict[str, Any]


class _Events:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    async def post(self, event: Event) -> None:
        self._queue.put_nowait(event)

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

    def post_fatal(self, message: str, exit_code: int) -> None:
        """Send an error that ends the run; returns when it has arrived."""
        ray.get(self._actor.post.remote(Event("fatal", {"message": message, "exit_code": exit_code})))

    def take(self, *, timeout_seconds: float) -> Event | None:
        """The next event, or None after `timeout_seconds`."""
        return ray.get(self._actor.take.remote(timeout_seconds))
