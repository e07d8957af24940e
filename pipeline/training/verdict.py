"""Verdicts on the health of a run, and the remedy for each. No torch here.

health.py finds collapse, tracking/start.py that a run is worse than its start.
"""

from enum import Enum

from dinoray.models.errors import DinorayError


class Verdict(str, Enum):
    """The health of a run: healthy, or its failure."""

    HEALTHY = "healthy"
    UNIFORM = "uniform collapse"
    SINGLE = "single-prototype collapse"
    NON_FINITE = "non-finite"
    WORSE = "worse than the start"

    @property
    def remedy(self) -> str:
        """Text of the suggested changes; empty if the run is healthy."""
        return _REMEDIES[self]


_REMEDIES = {
    Verdict.HEALTHY: "",
    Verdict.UNIFORM: (
        "all images get the same, even targets: sharpening is too weak; lower loss.teacher_temp, lengthen "
        "loss.warmup_teacher_temp_epochs, or lower optim.base_lr"
    ),
    Verdict.SINGLE: (
        "all images get the same prototype: centring is too slow or off; lower loss.center_momentum, set "
        "loss.centering=center, or raise loss.teacher_temp"
    ),
    Verdict.NON_FINITE: (
        "loss or gradients are not finite; lower optim.base_lr or optim.clip_grad, or set train.precision=fp32"
    ),
    Verdict.WORSE: (
        "training makes the features worse than those of the initial weights; lower optim.base_lr, lengthen "
        "optim.warmup_epochs, raise teacher.teacher_momentum, or set optim.layer_decay=0.9"
    ),
}


class UnhealthyError(DinorayError):
    """The run was ended because of its `verdict`."""

    raised_by_all_ranks = True

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message, verdict)  # both, so that it can be pickled
        self.verdict = verdict

    def __str__(self) -> str:
        return str(self.args[0])
