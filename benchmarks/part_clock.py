"""Splits the time of a step among its parts: by events on a GPU's stream, by CPU time on a CPU."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

PARTS = ("teacher forward", "student forward", "loss", "backward", "optimiser", "EMA", "other")
"""`loss`: from the student's logits to their gradient; `optimiser`: with clipping and what reads the gradients;
`other`: pixels to floats, centre, health and whatever no other part has."""


class PartClock:
    """What passes between two marks belongs to the part that the second one names."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._ms: Counter[str] = Counter()
        self._steps = 0

    def start(self) -> None:
        """Begin a step."""
        self._marks = []
        self.mark("start")

    def mark(self, part: str) -> None:
        """End a piece of `part`."""
        if not self._on_gpu:
            self._marks.append((part, time.process_time()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def stop(self) -> None:
        """End the step with `other`, and add it to the rest."""
        self.mark("other")
        if self._on_gpu:
            torch.cuda.synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            self._ms[part] += before.elapsed_time(after) if self._on_gpu else 1000 * (after - before)
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each part, a mean over the steps."""
        return {part: self._ms[part] / max(1, self._steps) for part in PARTS}


def no_mark(part: str) -> None:
    """Take the place of `PartClock.mark` where nothing is timed."""


Mark = Callable[[str], None]
