"""Find a train worker that hangs: one that gives no sign, or one that is at the same step for too long. No Ray here.

A stopped process, or one that waits for ever in a collective, ends by itself only after Ray's or NCCL's own limits of
10 to 30 minutes, and with an error that names another worker. So each worker sends a sign of life every few seconds,
with what it does, from a thread of its own; and the driver reads them.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

SIGN_SECONDS = 5.0
"""Time between two signs of a worker."""
SILENT_SECONDS = 30.0
"""Time without a sign after which a worker is named."""
STUCK_SECONDS = 60.0
"""Time at one step after which a worker is named."""

Doing = Literal["starts", "waits for images", "trains", "evaluates", "saves"]


@dataclass(frozen=True)
class Sign:
    """A sign of life of a train worker."""

    number: int
    """Of this worker's signs; each has a higher one."""
    address: str
    node_id: str
    pid: int
    started: str
    """When the process started, in a form that only this process has; empty where that is not known."""
    step: int = 0
    doing: Doing = "starts"
    seconds: float = 0.0
    """For how long it has done that."""
    stack: str = ""
    """Where its code is, if it has done that for long."""


class Found(NamedTuple):
    """What a look has found: lines for a person, and the worker that must be ended."""

    lines: list[str]
    to_end: Sign | None


class HangWatch:
    """Follows the signs of the train workers from the driver."""

    def __init__(self, limit_seconds: float, *, now: Callable[[], float] = time.monotonic) -> None:
        """`limit_seconds`: for how long a worker may hang."""
        self._limit, self._now = limit_seconds, now
        self._signs: dict[int, tuple[Sign, float]] = {}
        self._old: set[Sign] = set()
        self._named: set[int] = set()
        self._ended: set[tuple[str, int, str]] = set()

    def placed(self, num_workers: int) -> None:
        """So many workers have started. Signs of others are of those before, sent while these ended."""
        for rank in [rank for rank in self._signs if rank >= num_workers]:
            self._old.add(self._signs.pop(rank)[0])

    def forget(self) -> None:
        """The workers are ended or start again: what they said counts no more."""
        self._old |= {sign for sign, _ in self._signs.values()}
        self._signs, self._named = {}, set()

    def look(self, signs: Mapping[int, Sign]) -> Found:
        """Return what there is to say and to do; `signs`: the newest of each rank. Call every few seconds."""
        now = self._now()
        for rank, sign in signs.items():
            if sign not in self._old and (rank not in self._signs or self._signs[rank][0] != sign):
                self._signs[rank] = sign, now
        silent = {rank: now - at for rank, (_, at) in self._signs.items() if now - at >= SILENT_SECONDS}
        hanging = silent or self._stuck()
        self._named &= hanging.keys()
        lines, to_end = [], None
        for rank, seconds in hanging.items():
            sign = self._signs[rank][0]
            if rank not in self._named:
                self._named.add(rank)
                lines.append(self._line(rank, sign, seconds, is_silent=rank in silent))
            process = sign.node_id, sign.pid, sign.started
            if seconds >= self._limit and to_end is None and process not in self._ended:
                self._ended.add(process)
                to_end = sign
                lines.append(
                    f"ending train worker {rank} on node {sign.address}, which hangs for {seconds:.0f} s"
                )
        return Found(lines, to_end)

    def waits_for_images(self) -> Sign | None:
        """Return the sign of the worker that waits for images the longest; None if one trains, and is waited for."""
        signs = [sign for sign, _ in self._signs.values()]
        first = min((sign.step for sign in signs), default=0)
        waiting = [sign for sign in signs if sign.doing == "waits for images" and sign.step == first]
        return max(waiting, key=lambda sign: sign.seconds, default=None)

    def _stuck(self) -> dict[int, float]:
        """Workers that train at one step for too long: those that are behind the others, if some are."""
        if self.waits_for_images():
            return {}  # what they wait for is this worker, and it for the stream
        long = {
            rank: sign
            for rank, (sign, _) in self._signs.items()
            if sign.doing == "trains" and sign.seconds >= STUCK_SECONDS
        }
        first = min((sign.step for sign, _ in self._signs.values()), default=0)
        behind = {rank: sign for rank, sign in long.items() if sign.step == first}
        return {rank: sign.seconds for rank, sign in (behind or long).items()}

    def _line(self, rank: int, sign: Sign, seconds: float, *, is_silent: bool) -> str:
        who = f"train worker {rank} on node {sign.address} (process {sign.pid})"
        what = f"has given no sign for {seconds:.0f} s, after step {sign.step}"
        if not is_silent:
            what = f"is at step {sign.step + 1} for {seconds:.0f} s{f': {sign.stack}' if sign.stack else ''}"
        return f"warning: {who} {what}; after resources.hang_seconds={self._limit:g} it is replaced"
