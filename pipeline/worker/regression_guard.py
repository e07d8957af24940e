"""Warn of a run that is worse than the weights it starts from, or end it, by `health.on_regression`. No Ray here.

tracking/start.py has the rule.
"""

from typing import Protocol

from dinoray.pipeline.tracking.start import Regression
from dinoray.pipeline.training import distributed
from dinoray.pipeline.training.config import HealthConfig
from dinoray.pipeline.training.verdict import UnhealthyError, Verdict
from dinoray.pipeline.worker.cadence import Due


class Outputs(Protocol):
    """What is asked of the outputs of rank 0."""

    @property
    def regression(self) -> Regression | None: ...

    def note(self, text: str) -> None: ...


class RegressionGuard:
    """Rank 0, which has `outputs`, knows the scores; the others learn of a regression only where it ends the run."""

    def __init__(self, health: HealthConfig, outputs: Outputs | None) -> None:
        self._stops, self._outputs = health.on_regression == "stop", outputs
        self._is_known = False

    def look(self, due: Due) -> None:
        """At a logged step, print a warning once evaluations are worse than the start. All ranks call it alike.

        Raises UnhealthyError on all ranks if the run is to stop; after the last step it only warns.
        """
        if not due.logs:
            return
        found = self._outputs.regression if self._outputs else None
        text = None
        if found is not None:
            text = f"{Verdict.WORSE.value} since step {found.since}: {found.what}; {Verdict.WORSE.remedy}"
        if self._stops and not due.ends and (text := distributed.gather(text)[0]):
            raise UnhealthyError(f"{text}; to continue anyway, set health.on_regression=warn", Verdict.WORSE)
        if self._outputs and text and not self._is_known:
            self._outputs.note(f"warning: {text}")
        self._is_known = text is not None
