"""Steps that are not finite: skipped on the device, and known to the host some steps later. No Ray here.

To ask the device whether a step is finite, the host would have to wait for it: the device would then stand still until
the host has begun the next step. So all that a step changes is selected on the device, and the host looks at the
answer once the device is done with it anyway. The answers are the same on all ranks, and so is when they are learnt.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAG = 2
"""Steps after which the host looks at a step's answer, on any device; schedules wait for a skipped step from then on.

The host is then at most this many steps ahead of the device, which is enough to keep it busy.
"""


class Skip(NamedTuple):
    """A skipped step, counted from 1, and the counts of skipped steps up to it."""

    step: int
    total: int
    in_a_row: int


class Skips:
    """Counts of the skipped steps that the host knows of. All ranks call it alike.

    `add` after each step learns of the step LAG before it. `settle` learns of all steps and makes the host wait for the
    device: for steps after which it waits anyway. The schedules do not depend on when `settle` is called.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        total: int = 0,
        in_a_row: int = 0,
        recent: Sequence[bool] = (),
    ) -> None:
        """`recent`: whether the last steps, at most LAG, were skipped; `total` and `in_a_row` count them too."""
        self.total, self.in_a_row = total, in_a_row
        self._recent = deque([False] * LAG, maxlen=LAG)
        self._recent.extend(map(bool, recent))
        # Pinned, as a copy to other memory would wait for the device.
        self._answers = torch.zeros(LAG + 1, dtype=torch.bool, pin_memory=device.type == "cuda")
        self._as_array = self._answers.numpy()
        self._not_learnt: deque[tuple[int, torch.cuda.Event | None]] = deque()
        """Steps, and what tells that the answer has been copied."""
        self._told: list[Skip] = []

    @property
    def before_lag(self) -> int:
        """The number of skipped steps that schedules wait for: all but those of the last LAG steps."""
        return self.total - sum(islice(self._recent, len(self._not_learnt), None))

    def add(self, step: int, is_finite: Tensor) -> None:
        """Note the answer on `step`, counted from 1: a 0-d bool on the device. Learn of the step LAG before it."""
        slot = step % len(self._answers)
        self._answers[slot].copy_(is_finite, non_blocking=True)
        copied = None
        if is_finite.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._not_learnt.append((step, copied))
        if len(self._not_learnt) > LAG:
            self._learn()

    def settle(self) -> None:
        """Learn of all steps; wait for the device."""
        while self._not_learnt:
            self._learn()

    def take(self) -> list[Skip]:
        """Return the skipped steps that were learnt of since the last call."""
        told, self._told = self._told, []
        return told

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, for meta.json. Settles."""
        self.settle()
        return {
            "skipped": self.total,
            "skipped_in_a_row": self.in_a_row,
            "skipped_recently": list(self._recent),
        }

    @classmethod
    def restored(cls, meta: Mapping[str, Any], device: torch.device) -> "Skips":
        """Return the counts that meta.json holds. Earlier versions had no lag: their schedules wait for all skips."""
        recent = meta.get("skipped_recently", ())
        return cls(device, total=meta["skipped"], in_a_row=meta["skipped_in_a_row"], recent=recent)

    def _learn(self) -> None:
        step, copied = self._not_learnt.popleft()
        if copied is not None:
            copied.synchronize()
        is_skipped = not self._as_array[step % len(self._answers)]
        self._recent.append(is_skipped)
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        if is_skipped:
            self.total += 1
            self._told.append(Skip(step, self.total, self.in_a_row))


class Kept:
    """Values of buffers before a step. Few kernels, whatever their number: a ResNet-50 has 318."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        by_dtype = sorted(buffers, key=lambda x: str(x.dtype))
        self._groups = [list(same) for _, same in groupby(by_dtype, key=lambda x: x.dtype)]
        self._before = [_flat(same) for same in self._groups]

    def give_back_unless(self, is_finite: Tensor) -> None:
        """Set the buffers to the values before the step, unless the step `is_finite`, a 0-d bool on the device."""
        for group, before in zip(self._groups, self._before, strict=True):
            chosen = torch.where(is_finite, _flat(group), before).split([x.numel() for x in group])
            torch._foreach_copy_(group, [new.view_as(x) for new, x in zip(chosen, group, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])
