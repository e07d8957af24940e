"""Schedules: pure functions step -> value. `step` is 0-based and is the step about to run.

Steps past the end keep the last value, so a run that is extended or restarted never indexes past a table.
"""

import math
from typing import NamedTuple

from dinoray.models.settings import Auto

_LEAST_FROZEN, _LEAST_SHARE, _GREATEST = 1000, 10, 5
"""Steps; the least length is at most a run's steps by the second, the greatest is the least times the third."""


def warmup_cosine(step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Rise linearly from 0 to `base` over `warmup_steps` (inclusive), then follow half a cosine to `final`.

    As published, `final` would be reached at step `total_steps`, one past the last step.
    """
    if step < warmup_steps:
        return base * step / max(1, warmup_steps - 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def warmup_constant(step: int, *, base: float, warmup_steps: int = 0) -> float:
    """Rise linearly from 0 to `base` over `warmup_steps` (inclusive), then stay at `base`."""
    return base * step / max(1, warmup_steps - 1) if step < warmup_steps else base


def teacher_temp(epoch: int, *, base: float, warmup: float, warmup_epochs: int) -> float:
    """Return the teacher temperature: `warmup_epochs` even stairs from `warmup` to `base`, then `base`."""
    if epoch >= warmup_epochs:
        return base
    return warmup + (base - warmup) * epoch / max(1, warmup_epochs - 1)


class FrozenLimits(NamedTuple):
    """Least and greatest length of the stage with a frozen backbone, and of a window of its loss; in steps."""

    least: int
    greatest: int
    window: int


def frozen_limits(freeze_steps: int | Auto, total_steps: int) -> FrozenLimits:
    """Return the limits of the stage in a run of `total_steps`.

    auto: at least 1,000 steps, but at most a tenth of the run; at most five times that; windows of a tenth of it.
    """
    if freeze_steps != "auto":
        return FrozenLimits(freeze_steps, freeze_steps, max(1, freeze_steps))
    least = max(1, min(_LEAST_FROZEN, total_steps // _LEAST_SHARE))
    return FrozenLimits(least, _GREATEST * least, max(1, least // 10))


def cap_warmup(warmup: int, total: int) -> int:
    """Return `warmup`, or 30 % of `total` if the warm-up would not end within the run."""
    return warmup if warmup < total else int(0.3 * total)


def scaled_lr(base_lr: float, global_batch_size: int) -> float:
    """Apply the linear scaling rule: `base_lr` is for a global batch of 256."""
    return base_lr * global_batch_size / 256
