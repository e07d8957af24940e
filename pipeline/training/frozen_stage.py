"""The first stage of a run that starts from weights: the backbone is frozen while fresh heads converge. No Ray here.

The stage ends by `init.freeze_steps`. With auto, it ends once the loss is flat, which this module decides from the
loss of each step: a mean over all processes, so all of them end the stage at the same step. The loss is read every
`window` steps, whatever is logged, so logging does not change what is learnt.

- Flat: the mean of the last three windows is within 1 % of the mean of the three before.
- `models/schedules.py` has the least and the greatest length, and that of a window. At the greatest length the stage
  ends, flat or not.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dinoray.models.schedules import frozen_limits
from dinoray.models.settings import Auto

_WINDOWS = 3
_FLAT = 0.01


def is_flat(means: Sequence[float]) -> bool:
    """Return True if the mean losses of windows, in their order, have stopped to change; False for few windows."""
    if len(means) < 2 * _WINDOWS:
        return False
    before, last = fmean(means[-2 * _WINDOWS : -_WINDOWS]), fmean(means[-_WINDOWS:])
    return abs(last - before) <= _FLAT * abs(before)


class FrozenStage:
    """What a run knows of the stage: call `add` after each of its steps, on all ranks."""

    def __init__(self, freeze_steps: int | Auto, *, total_steps: int, device: torch.device) -> None:
        self._limits = frozen_limits(freeze_steps, total_steps)
        self.is_configured = freeze_steps != 0
        self.ended_at: int | None = None if self.is_configured else 0
        """The step of the schedules at which the backbone begins to learn; None: it is frozen."""
        self._why = ""
        self._num_steps = 0
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Of the window under way: losses, and steps that are not skipped."""
        self._means: list[float] = []

    @property
    def is_on(self) -> bool:
        """Whether the backbone is frozen."""
        return self.ended_at is None

    def add(self, loss: Tensor, is_finite: Tensor) -> bool:
        """Count a step; return whether the stage is over. `loss`: the step's mean over all processes.

        A step that is not `is_finite`, a 0-d bool on the device, counts but its loss does not. Only the end of a
        window waits for the device.
        """
        least, greatest, window = self._limits
        self._num_steps += 1
        if self._num_steps >= greatest:
            self._why = "init.freeze_steps allows no more"
            return True
        self._sums += torch.stack([torch.where(is_finite, loss, 0.0), is_finite.to(loss)]).double()
        if self._num_steps % window:
            return False
        total, count = self._sums.tolist()
        self._sums.zero_()
        if count:
            self._means.append(total / count)
        if self._num_steps < least or not is_flat(self._means):
            return False
        self._why = f"the loss is flat, {self._means[-1]:.4g}"
        return True

    def take_ending(self) -> str:
        """Return once, in the process in which the stage ended, a line about that; otherwise nothing."""
        why, self._why = self._why, ""
        text = f"the backbone learns from now on, after {self._num_steps} steps of the heads alone: {why}"
        return text if why else ""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as tensors and numbers."""
        return {
            "ended_at": self.ended_at,
            "num_steps": self._num_steps,
            "sums": self._sums,
            "means": self._means,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state_dict` returned. None: of a run that had no such stage, which is past it."""
        if state is None:
            self.ended_at = 0
            return
        self.ended_at, self._num_steps = state["ended_at"], state["num_steps"]
        self._sums.copy_(state["sums"])
        self._means = list(state["means"])
