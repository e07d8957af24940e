"""A train worker's signs of life, sent from a thread of its own; and the end of a worker that gives none."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.hangs import SIGN_SECONDS, STUCK_SECONDS, Doing, Sign
from dinoray.pipeline.storage.lease_keeper import process_started

SIGNS = "signs of life"
"""Name under which the run's channel keeps the newest sign of each rank."""

_FRAMES = 3
"""Innermost calls that a sign names."""


class Signs:
    """Sends what this worker does, every few seconds until the process ends."""

    def __init__(self, channel: RunChannel, rank: int) -> None:
        self._channel, self._rank = channel, rank
        self._node_id, self._address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        self._trains_in = threading.get_ident()
        self._now: tuple[int, Doing, float] = (0, "starts", time.monotonic())
        threading.Thread(target=self._send, name="signs of life", daemon=True).start()

    def does(self, step: int, doing: Doing) -> None:
        """Note what the worker does from now on, after `step`."""
        self._now = step, doing, time.monotonic()

    def _send(self) -> None:
        # Also while this worker is done and others are not: who is silent hangs.
        for number in itertools.count():
            self._channel.merge(SIGNS, {self._rank: self._sign(number)})
            time.sleep(SIGN_SECONDS)

    def _sign(self, number: int) -> Sign:
        step, doing, since = self._now
        seconds, pid = time.monotonic() - since, os.getpid()
        stack = self._stack() if seconds > STUCK_SECONDS - 2 * SIGN_SECONDS else ""
        return Sign(number, self._address, self._node_id, pid, _started(pid), step, doing, seconds, stack)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._trains_in)
        calls = traceback.extract_stack(frame)[-_FRAMES:] if frame else []
        return " < ".join(
            f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in reversed(calls)
        )


def end_worker(sign: Sign) -> None:
    """Kill the process that gave `sign`, from a task on its node, without waiting."""
    there = NodeAffinitySchedulingStrategy(sign.node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_kill).remote(sign.pid, sign.started)


def _kill(pid: int, started: str) -> None:
    if _started(pid) == started:  # else the number is another process's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _started(pid: int) -> str:
    """When a process started, in a form that only this process has; empty where the system does not say."""
    return process_started(pid) or ""
