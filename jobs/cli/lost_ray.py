"""A Ray that is lost while a job uses it: the errors that mean this, and a watch over its head.

Ray's core ends the process by itself once the head is gone for a minute, with a page of C++ stack. The watch ends
the job earlier, with one line.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import ray
from ray import exceptions
from rich.console import Console

from dinoray.models.errors import DinorayError, ResourceError, one_line
from dinoray.pipeline.cluster.channel import known_error

_POLL_SECONDS = 1.0
_LOCAL_SECONDS = 5.0
"""A local Ray that is gone does not come back."""
_GRACE_SECONDS = 30.0
"""Time that the main thread has to end the job; it may wait inside Ray for ever."""
_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own limit, which a cluster whose head can be replaced may have raised."""
_AGAIN = "run the same command again"

_ADVICE: dict[type[Exception], str] = {
    exceptions.OutOfMemoryError: "set fewer resources.augment_actors, or give the node more memory",
    exceptions.OutOfDiskError: "free disk space on the node, or set RAY_TMPDIR to a folder on a larger disk",
}
_LOSSES = (
    *_ADVICE,
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.LocalRayletDiedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.ObjectStoreFullError,
    exceptions.RuntimeEnvSetupError,
    exceptions.TaskUnschedulableError,
    exceptions.ActorUnschedulableError,
    exceptions.RpcError,
    exceptions.RaySystemError,
)


class LostRayError(ResourceError):
    """Ray, or a part of it that the job needs, is gone."""

    def __init__(self, what: str, remedy: str = _AGAIN) -> None:
        """`what` happened, without what to do about it."""
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
        """May be set to a better one, by who knows what the job was doing."""

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def error_to_print(error: Exception) -> DinorayError | None:
    """What a person is to read of an error that ends a job; None for a bug, which is for its traceback."""
    return known_error(error) or _lost_ray(error)


def _lost_ray(error: BaseException | None) -> LostRayError | None:
    """The loss that `error` is or was caused by."""
    if _watch is not None and _watch.loss is not None:
        return _watch.loss
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, _LOSSES) and not _is_from_code(error):
            advice = [f"; {text}" for kind, text in _ADVICE.items() if isinstance(error, kind)]
            return LostRayError("".join([_describe(error), *advice]))
        error = _cause(error)
    return None


def _is_from_code(error: Exception) -> bool:
    """Whether code raised it: a constructor of an actor, or what an object needs to be read."""
    return getattr(error, "actor_init_failed", False) or bool(getattr(error, "traceback_str", None))


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


def _cause(error: BaseException) -> BaseException | None:
    """What `error` was raised for, through the wrapping of Ray and of Ray Train."""
    for failure in getattr(error, "worker_failures", {}).values():
        # Workers that outlive a lost one fail in its wake.
        if isinstance(failure, _LOSSES):
            return failure
    cause = getattr(error, "controller_failure", None) or getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error.__cause__


def _describe(error: Exception) -> str:
    actor = re.search(r"class_name: (\S+)", str(error))
    if actor:
        return f"Ray has lost its actor {actor[1]}: {one_line(error, limit=60)}"
    return f"Ray has failed: {type(error).__name__}: {one_line(error, limit=160)}"


_last_words: list[Callable[[LostRayError], None]] = []


@contextlib.contextmanager
def last_words(say: Callable[[LostRayError], None]) -> Iterator[None]:
    """Have `say` called with a loss of Ray that ends the job within this context.

    The main thread may wait inside Ray for ever, with no handler of errors ever called: then the watch calls it.
    """
    _last_words.append(say)
    try:
        yield
    except Exception as error:
        loss = error_to_print(error)
        if not isinstance(loss, LostRayError):
            raise
        say(loss)
        raise loss from (None if loss is error else error)
    finally:
        _last_words.remove(say)


class _Watch(threading.Thread):
    """Connects to the ports of Ray's head and of this node each second, until one is gone or Ray is shut down."""

    def __init__(self, *, local: bool) -> None:
        super().__init__(name="ray-watch", daemon=True)
        self.loss: LostRayError | None = None
        self._ports = {"head": _address(ray.get_runtime_context().gcs_address)}
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == here:
                self._ports["raylet"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
        limit = float(os.environ.get(_LIMIT, "60"))
        self._patience = _LOCAL_SECONDS if local else 0.4 * limit
        self._whose = "the local Ray" if local else "the Ray cluster"

    def run(self) -> None:
        answered = dict.fromkeys(self._ports, time.monotonic())
        while ray.is_initialized():
            time.sleep(_POLL_SECONDS)
            for part, port in self._ports.items():
                if answers(*port, timeout_seconds=_LOCAL_SECONDS):
                    answered[part] = time.monotonic()
                elif time.monotonic() - answered[part] > self._patience and ray.is_initialized():
                    self._end_job(part)
                    return

    def _end_job(self, part: str) -> None:
        host, port = self._ports[part]
        self.loss = LostRayError(
            f"{self._whose} is lost: its {part} at {host}:{port} has not answered for {self._patience:.0f} s"
        )
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        time.sleep(_GRACE_SECONDS)
        for say in _last_words:
            with contextlib.suppress(Exception):  # the loss is what a person must read of
                say(self.loss)
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


_watch: _Watch | None = None
_ending = threading.Lock()


def watch_ray(*, local: bool) -> None:
    """Have a Ray that is up watched, until it is shut down. Call in the main thread."""
    global _watch
    _watch = _Watch(local=local)
    signal.signal(signal.SIGUSR2, _watch.interrupt)
    _watch.start()


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
