"""What is due at a step: a pure function of the step and the settings. No torch and no Ray here."""

from typing import NamedTuple


class Cadence(NamedTuple):
    """Intervals in steps, and the length of the run."""

    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    def due(self, step: int, *, fails: bool = False) -> "Due":
        """Return what is due once `step` steps are done; `fails`: the run is about to end or restart.

        What is evaluated or saved is also logged, so that each score and checkpoint has its metrics.
        """
        ends = step == self.total_steps
        evaluates = ends or step % self.eval_every == 0
        saves = ends or step % self.checkpoint_every == 0
        logs = ends or evaluates or saves or fails or step % self.log_every == 0
        return Due(ends, logs, evaluates, saves)


class Due(NamedTuple):
    """What is due at a step."""

    ends: bool
    logs: bool
    evaluates: bool
    saves: bool
