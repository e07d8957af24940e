"""Which saves are due by time (`checkpoint.every_minutes`). No torch and no Ray here.

Rank 0 asks it at logged steps, and decides for all ranks. When a save is due changes nothing in what is learnt.
"""

from collections import deque
from statistics import median

from dinoray.pipeline.training.config import CheckpointConfig

_FIRST_SECONDS = 60.0
"""With `auto`, training time before the first save, which measures what a save takes."""
_AGAIN_SECONDS = 60.0
"""Longest time until a save that was left out is due again."""
_NUM_MEASURED = 5
"""Number of newest saves whose median is the time of a save: the first one is slower, and so is one that waits."""


class SaveClock:
    """Decides whether a save is due. All times are seconds on one clock that never goes back."""

    def __init__(self, config: CheckpointConfig, *, now: float) -> None:
        self._config = config
        self._held_up: deque[float] = deque(maxlen=_NUM_MEASURED)
        self._due_at = now + self.interval_seconds

    @property
    def interval_seconds(self) -> float:
        """Training time between two saves; infinite if steps decide."""
        if self._config.every_minutes == "auto" and not self._held_up:
            return _FIRST_SECONDS
        seconds = self._config.interval_seconds(median(self._held_up or [0.0]))
        return float("inf") if seconds is None else seconds

    def is_due(self, now: float) -> bool:
        """Return True if a save is due."""
        return now >= self._due_at

    def saved(self, began: float, ended: float) -> str | None:
        """Record that training was held up from `began` to `ended` by a save, due by time or not.

        Return a line on the interval that follows from the first one, if the interval is `auto`.
        """
        is_first = not self._held_up
        self._held_up.append(ended - began)
        self._due_at = ended + self.interval_seconds
        if self._config.every_minutes != "auto" or not is_first:
            return None
        return (
            f"checkpoint.every_minutes=auto: one save every {self.interval_seconds / 60:.2g} minutes, because it holds "
            f"training up for {ended - began:.2g} s (checkpoint.failures_per_day={self._config.failures_per_day:g})"
        )

    def left_out(self, now: float) -> None:
        """Record that a save was due and not begun."""
        self._due_at = now + min(self.interval_seconds, _AGAIN_SECONDS)
