"""A watch over the head of Ray while a job uses it, and the end of a job whose Ray is lost.

Ray's core ends the process by itself once the head is gone for a minute, with a page of C++ stack. The watch ends
the job earlier, with one line.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import ray
from rich.console import Console

from dinoray.models.errors import DinorayError
from dinoray.pipeline.cluster.lost_ray import LostRayError, notice, say_last_words

_POLL_SECONDS = 1.0
_LOCAL_SECONDS = 5.0
"""A local Ray that is gone does not come back."""
_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own limit, which a cluster whose head can be replaced may have raised."""
_PATIENCE, _GRACE = 0.4, 0.15
"""Shares of that limit: until the loss is certain; for the main thread, which may wait inside Ray for ever, to end the
job; and as much again for the last words. Together they leave a quarter of it: at its end Ray's core ends the process
without a word."""


def _address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def answers(host: str, port: int, *, timeout_seconds: float) -> bool:
    """Whether something takes a connection there."""
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=timeout_seconds).close()
        return True
    return False


def _connection() -> tuple[str, str]:
    """The address of the head that this process is connected to, and the job that it is there."""
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_job_id()


class _Watch(threading.Thread):
    """Connects to the ports of Ray's head and of this node each second, until one is gone or Ray is shut down."""

    def __init__(self, *, local: bool) -> None:
        super().__init__(name="ray-watch", daemon=True)
        self.loss: LostRayError | None = None
        self._connection = _connection()
        self._ports = {"head": _address(self._connection[0])}
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == here:
                self._ports["raylet"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
        limit = float(os.environ.get(_LIMIT, "60"))
        self._patience, self._grace = _LOCAL_SECONDS if local else _PATIENCE * limit, _GRACE * limit
        self._whose = "the local Ray" if local else "the Ray cluster"

    def run(self) -> None:
        answered = dict.fromkeys(self._ports, time.monotonic())
        while self._is_awaited():
            time.sleep(_POLL_SECONDS)
            for part, port in self._ports.items():
                if answers(*port, timeout_seconds=_LOCAL_SECONDS):
                    answered[part] = time.monotonic()
                elif time.monotonic() - answered[part] > self._patience and self._is_awaited():
                    self._end_job(part)
                    return

    def _is_awaited(self) -> bool:
        """Whether this process still uses the Ray that it did, not another one since."""
        with contextlib.suppress(Exception):  # it is just being shut down
            return ray.is_initialized() and _connection() == self._connection
        return False

    def _end_job(self, part: str) -> None:
        host, port = self._ports[part]
        self.loss = LostRayError(
            f"{self._whose} is lost: its {part} at {host}:{port} has not answered for {self._patience:.0f} s"
        )
        notice(self.loss)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        time.sleep(self._grace)
        # They may ask a storage that is lost as well.
        last = threading.Thread(target=say_last_words, args=(self.loss,), daemon=True)
        last.start()
        last.join(self._grace)
        # The live view may still be open: it holds both streams and hides the cursor.
        sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
        sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        if (screen := Console()).is_terminal:
            screen.show_cursor()
            screen.line()
        end_at_once(self.loss)

    def interrupt(self, _: int, __: FrameType | None) -> None:
        """Raise the loss in the main thread, unless another error ends the job already."""
        if self.loss is not None and not isinstance(sys.exc_info()[1], Exception):
            raise self.loss


_ending = threading.Lock()


def watch_ray(*, local: bool) -> None:
    """Have a Ray that is up watched, until it is shut down. Call in the main thread."""
    notice(None)
    watch = _Watch(local=local)
    signal.signal(signal.SIGUSR2, watch.interrupt)
    watch.start()


def end_at_once(error: DinorayError) -> NoReturn:
    """Print the error and end the process, without waiting for threads of a Ray that may be gone."""
    _ending.acquire()  # for good: who comes second prints nothing
    print_error(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(error.exit_code)


def print_error(error: DinorayError) -> None:
    """What a job prints about an error that ends it."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
