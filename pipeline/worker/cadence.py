"""What is due at a step: a pure function of the step and the settings. No torch and no Ray here."""

from typing import NamedTuple

from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.tracking.config import LogConfig
from dinoray.pipeline.training.config import CheckpointConfig


class Cadence(NamedTuple):
    """Intervals in steps, and the length of the run. What is due by time is in save_clock.py."""

    total_steps: int
    log_every: int
    eval_every: int
    save_every: tuple[int, ...]
    """Multiples of any of these are saved."""

    @classmethod
    def of(
        cls,
        total_steps: int,
        *,
        log: LogConfig,
        evaluation: EvalConfig,
        checkpoint: CheckpointConfig,
        is_scored: bool,
    ) -> "Cadence":
        """Return the intervals of a run whose evaluations have scores if it `is_scored`."""
        is_beside = evaluation.where == "side"
        saves = (
            checkpoint.every_steps if checkpoint.every_minutes is None else None,
            checkpoint.keep_every_steps,
            # The best are checkpoints of evaluated steps; an evaluation beside training that a loss interrupts is
            # repeated from one.
            evaluation.every_steps if is_scored and (checkpoint.num_best_to_keep or is_beside) else None,
        )
        every = tuple(steps for steps in saves if steps is not None)
        return cls(total_steps, log.every_steps, evaluation.every_steps, every)

    def due(self, step: int, *, fails: bool = False) -> "Due":
        """Return what is due once `step` steps are done; `fails`: the run is about to end or restart.

        What is evaluated or saved is also logged, so that each score and checkpoint has its metrics.
        """
        ends = step == self.total_steps
        evaluates = ends or step % self.eval_every == 0
        saves = ends or any(step % every == 0 for every in self.save_every)
        logs = ends or evaluates or saves or fails or step % self.log_every == 0
        return Due(ends, logs, evaluates, saves)

    @property
    def num_saves(self) -> int:
        """Number of steps of the run that are saved."""
        return len({self.total_steps}.union(*(range(n, self.total_steps + 1, n) for n in self.save_every)))


class Due(NamedTuple):
    """What is due at a step."""

    ends: bool
    logs: bool
    evaluates: bool
    saves: bool
