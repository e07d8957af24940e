"""Train workers agree before each step that all of them have a batch, and whether it is the last one.

Without it, a worker that has one would wait in the backward pass for one that has none, until NCCL gives up; and no
checkpoint could be saved. Gloo carries it, on CPUs: 0.4 ms a step.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dinoray.models.errors import DinorayError
from dinoray.pipeline.training.distributed import world_size

Batch = TypeVar("Batch")

_MARGIN_SECONDS = 600.0
"""Beyond the time that a read of one worker may wait for the storage."""


_NO_BATCH, _LAST, _GO_ON = range(3)
"""What a worker says before a step; the least of all counts."""


class StreamFailedError(Exception):
    """The stream of at least one worker has failed. All workers raise it, after the same step."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
        """The first error that a person can act on, if there is one; raised once the last step is saved."""


class Agreement:
    """A process group of its own. Its time limit is long enough for a worker that waits for storage.

    `known` returns the error behind an exception of the stream that a person can act on, or None. No Ray here.
    """

    def __init__(
        self, *, patience_seconds: float, known: Callable[[Exception | None], DinorayError | None]
    ) -> None:
        self._known = known
        self.ends = False
        """Whether one of the workers was asked to end with the batch that was yielded last."""
        self._group: Any = None
        if world_size() > 1:
            timeout = timedelta(seconds=patience_seconds + _MARGIN_SECONDS)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def batches(
        self, mine: Iterable[Batch], is_asked_to_end: Callable[[], bool] = lambda: False
    ) -> Iterator[Batch]:
        """Yield this worker's batches for as long as all workers have one. Raises StreamFailedError if one fails."""
        iterator = iter(mine)
        while True:
            batch, error = None, None
            try:
                batch = next(iterator, None)
            except Exception as caught:
                error = caught
            agreed = self._least(_NO_BATCH if batch is None else _LAST if is_asked_to_end() else _GO_ON)
            if agreed == _NO_BATCH:
                break
            assert batch is not None
            self.ends = agreed == _LAST
            yield batch
        first = self._first_known(error)
        if first is not None:
            first.raised_by_all_ranks = True
            raise StreamFailedError(first) from error
        if not self.is_everywhere(error is None):
            raise StreamFailedError(error or RuntimeError("the stream of another train worker has failed"))

    def is_everywhere(self, mine: bool) -> bool:
        """Return True on all workers if `mine` is True on all of them."""
        return bool(self._least(int(mine)))

    def _least(self, mine: int) -> int:
        if self._group is None:
            return mine
        agreed = torch.tensor(mine)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
        return int(agreed)

    def _first_known(self, error: Exception | None) -> DinorayError | None:
        """Return the first worker's error that a person can act on; the same on all workers."""
        mine = pickle.dumps(self._known(error))
        held: list[Any] = [mine]
        if self._group is not None:
            held = [None] * world_size()
            dist.all_gather_object(held, mine, group=self._group)
        return next((found for part in held if (found := pickle.loads(part)) is not None), None)
