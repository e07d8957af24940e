"""Schedules: pure functions step -> value. `step` is 0-based and is the step about to run.

Steps past the end keep the last value, so a run that is extended or restarted never indexes past a table.
"""

import math


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


def cap_warmup(warmup: int, total: int) -> int:
    """Return `warmup`, or 30 % of `total` if the warm-up would not end within the run."""
    return warmup if warmup < total else int(0.3 * total)


def scaled_lr(base_lr: float, global_batch_size: int) -> float:
    """Apply the linear scaling rule: `base_lr` is for a global batch of 256."""
    return base_lr * global_batch_size / 256
