"""A Ray that is lost while a job uses it: which errors mean this, and what is done before the job ends."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence

import ray
from ray import exceptions

from dinoray.models.errors import DinorayError, ResourceError, one_line
from dinoray.pipeline.cluster.capacity import BROKEN
from dinoray.pipeline.cluster.channel import EndRequest, RunChannel, known_error

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

_CONNECTION = re.compile(
    r"\b(?:gloo|NCCL|ncclRemoteError)\b|connection (?:closed|reset) by peer", re.IGNORECASE
)
"""In an error of a collective, whose other side is gone."""


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
    if _noticed is not None:
        return _noticed
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


def _cause(error: BaseException) -> BaseException | None:
    """What `error` was raised for, through the wrapping of Ray and of Ray Train."""
    for failure in getattr(error, "worker_failures", {}).values():
        # Workers that outlive a lost one fail in its wake.
        if isinstance(failure, _LOSSES):
            return failure
    cause = getattr(error, "controller_failure", None) or getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error.__cause__


def post_loss(channel: RunChannel, error: Exception) -> None:
    """Tell a run's driver for which error of Ray Train all train workers are started again."""
    channel.post("lost", text=describe_loss(error))


def save_elsewhere(channel: RunChannel, node_ids: Sequence[str], deadline_ms: int | None) -> None:
    """Have the train workers save a checkpoint and start again without these nodes, which are taken back."""
    there = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = f"node {', '.join(sorted(there.get(node, node) for node in node_ids))} taken back"
    within = "" if deadline_ms is None else f" in {max(0, deadline_ms / 1000 - time.time()):.0f} s"
    channel.request_end(EndRequest(restart=nodes))
    channel.post("note", text=f"{nodes}{within}: the run saves a checkpoint and goes on without it")


def describe_loss(error: Exception) -> str:
    """Return what has ended train workers, e.g. `node 10.0.0.7 lost`: the cause, not the failures in its wake."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return f"train workers lost ({one_line(_cause(error) or error, limit=100)})"
    # A worker that does not answer is often found dead only by the check of its health, which holds the reason.
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()}
    rank, failure = min(causes.items(), key=lambda item: not isinstance(item[1], _LOSSES))
    text = str(failure)
    address = re.search(r"\bip: (\S+)", text)
    where = f"node {address[1]}" if address else "its node"
    if (
        isinstance(failure, exceptions.NodeDiedError)
        or "node has died" in text
        or "node was terminated" in text
    ):
        return f"{where} lost"
    if isinstance(failure, exceptions.RayActorError):
        return f"train worker {rank} on {where} died"
    if _CONNECTION.search(text):
        return BROKEN
    cause = getattr(failure, "cause", None) or failure
    return f"train worker {rank} failed ({one_line(cause, limit=100)})"


def _describe(error: Exception) -> str:
    actor = re.search(r"class_name: (\S+)", str(error))
    if actor:
        return f"Ray has lost its actor {actor[1]}: {one_line(error, limit=60)}"
    return f"Ray has failed: {type(error).__name__}: {one_line(error, limit=160)}"


_last_words: list[Callable[[LostRayError], None]] = []
_noticed: LostRayError | None = None
"""The loss that a watch over Ray noticed, to which any error after it is due."""


def notice(loss: LostRayError | None) -> None:
    """Take errors from now on for consequences of this loss; None: of none."""
    global _noticed
    _noticed = loss


def leave_ray() -> None:
    """Leave Ray, unless a watch has noticed that it is lost.

    Threads that wait inside a lost Ray crash the process when it is shut down, before its error is printed.
    """
    if _noticed is None:
        ray.shutdown()


def say_last_words(loss: LostRayError) -> None:
    """Call what `last_words` was given, whatever comes of it."""
    for say in _last_words:
        with contextlib.suppress(Exception):  # the loss is what a person must read of
            say(loss)


@contextlib.contextmanager
def last_words(say: Callable[[LostRayError], None]) -> Iterator[None]:
    """Have `say` called with a loss of Ray that ends the job within this context.

    The main thread may wait inside Ray for ever, with no handler of errors ever called: then a watch calls it.
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
