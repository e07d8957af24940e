"""Private names of Ray Tune: population based training whose members wait for one another.

The public PB2 lets a trial take over from whichever trials have reported by then, which depends on their speed, and may
clone its donor's settings unchanged. Without these names `tune.scheduler=pb2` is refused. The same in Ray
2.58.1, 2.59.0 and 2.60.0.
"""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers.pb2 import PB2

from dinoray.models.errors import ResourceError

_NAMES = ("_exploit", "_get_new_config", "_save_trial_state")


def check_pb2() -> None:
    """ResourceError where PB2 lacks a method that dinoray's scheduler calls or replaces."""
    missing = [name for name in _NAMES if not hasattr(PB2, name)]
    if missing:
        raise ResourceError(
            f"tune.scheduler=pb2 needs {', '.join(missing)} of PB2, which this version of Ray does not have: "
            "pip install 'ray[tune]==2.60.*', or set tune.scheduler=asha"
        )


class OpenPB2(PB2):
    """PB2 with names for the parts that a scheduler built on it needs."""

    def knows(self, trial: Trial) -> bool:
        """Whether the trial was added before."""
        return trial in self._trial_state

    def note_result(self, trial: Trial, step: int, result: dict[str, Any]) -> None:
        """Record a score of the trial."""
        self._save_trial_state(self._trial_state[trial], step, result, trial)

    def replace(self, tune_controller: Any, trial: Trial, donor: Trial) -> None:
        """Have the trial continue from the donor's last checkpoint, with settings of its own."""
        self._trial_state[donor].last_checkpoint = newest_checkpoint(donor)
        self._exploit(tune_controller, trial, donor)

    def new_config(self, trial: Trial, donor: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return settings for the trial and what was done to each. May be replaced."""
        return super()._get_new_config(trial, donor)

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.new_config(trial, trial_to_clone)


def newest_checkpoint(trial: Trial) -> Any:
    """Return the checkpoint of the last report, which Tune may still be saving."""
    saving = trial.temporary_state.saving_to
    saved = saving.resolve() if saving else None
    return saved.checkpoint if saved else trial.checkpoint
