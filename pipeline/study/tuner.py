"""Ray Tune as both kinds of search use it (tuning.py, population.py): started, listened to, and stopped.

Trials run as Tune's functions in processes on the head, where no work is done and no spot node takes them with it.
Nothing of Tune's own state is ever read again: pipeline/study/trials.py is what a study continues from.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from models.settings import DinorayError, error_of, one_line
from pipeline.storage import Directory, filesystem

_ON_HEAD = "node:__internal_head__"


class Unsaved:
    """Tune pickles what it is given, to restore it later. Ours is not: it holds the driver's console and files."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Listener(Unsaved, tune.Callback):
    """Hears of the ends of trials, and of an error that concerns them all: it ends the study."""

    fatal: DinorayError | None = None

    def on_trial_result(
        self,
        iteration: int,
        trials: Sequence[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Tune's hook."""
        if "error" in result:
            self.fatal = error_of(result["error"], result["exit_code"])

    def on_trial_complete(
        self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Tune's hook."""
        if self.fatal is None:
            self.ended(trial, None)

    def on_trial_error(
        self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Tune's hook, after the last attempt."""
        self.ended(trial, one_line(trial.get_error()))

    def ended(self, trial: TuneTrial, error: str | None) -> None:
        """A trial has ended, or failed for good with this error."""
        raise TypeError(f"{type(self).__name__} does not say what the end of {trial} means")


class _Stopper(Unsaved, tune.Stopper):
    """Stops all trials once the listener has heard of a fatal error."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._listener.fatal is not None


def tell_error(error: DinorayError) -> None:
    """Of a trial, in it: an error that would meet every trial is told, not raised, since what is raised is retried."""
    tune.report({"error": str(error), "exit_code": error.exit_code})


def run_tune(
    trainable: Callable[[dict[str, Any]], None],
    listener: "Listener",
    config: tune.TuneConfig,
    *,
    study: Directory,
    max_failures: int,
    space: Mapping[str, Any] | None = None,
) -> None:
    """Run Tune to its end, its own records in the study's folder `ray`; raises what the listener calls fatal."""
    # Ctrl-C ends the study as it ends any job; trials write their own records, and what is seen of them is ours.
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may collapse before it is first evaluated
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    storage, path = filesystem(study.uri)
    tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([{_ON_HEAD: 0.001}])),
        param_space=dict(space or {}),
        tune_config=config,
        run_config=tune.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=storage,
            verbose=0,
            stop=_Stopper(listener),
            callbacks=[listener],
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    ).fit()
    if listener.fatal is not None:
        raise listener.fatal
