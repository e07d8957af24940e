"""Ray Tune for both kinds of search (tuning.py, population.py): start, callbacks, stop.

Trials run as Tune functions in processes on the head, which runs no other work and is no spot node. Tune's
own state is never read again: a study resumes from pipeline/study/trials.py.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.util
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.util.placement_group import PlacementGroup, remove_placement_group

from dinoray.models.errors import DinorayError, error_of
from dinoray.pipeline.cluster.channel import actor_here
from dinoray.pipeline.storage.files import Directory, filesystem

_ON_HEAD = "node:__internal_head__"


class NotPickled:
    """Excludes an object from Tune's pickled state: ours holds the driver's console and files."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class PlacementGroupRegistry:
    """Placement groups of the trials' workers. The driver removes them if the process of a trial was killed.

    Ray Train leaves this to the dashboard, which may not be running.
    """

    def __init__(self) -> None:
        self._actor = actor_here(_Groups)

    def keep(self, name: str, group: PlacementGroup) -> None:
        """Record the current placement group of a trial's workers."""
        self._actor.keep.remote(name, group)

    def clear(self, name: str) -> None:
        """Remove the recorded group of the trial with its workers; ignore a group that no longer exists."""
        group = ray.get(self._actor.take.remote(name))
        if group is not None:
            remove_placement_group(group)


def remove_left_group(group_id: str) -> None:
    """Remove the placement group with this hexadecimal id, if it exists: it may outlive a killed driver."""
    if ray.util.placement_group_table().get(group_id, {}).get("state") not in (None, "REMOVED"):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


class _Groups:
    def __init__(self) -> None:
        self._groups: dict[str, PlacementGroup] = {}

    def keep(self, name: str, group: PlacementGroup) -> None:
        self._groups[name] = group

    def take(self, name: str) -> PlacementGroup | None:
        return self._groups.pop(name, None)


class TrialListener(NotPickled, tune.Callback):
    """Handles the ends of trials, and ends the study at an error that concerns all trials.

    Leftovers of a killed attempt are removed before the next attempt, and after the last.
    """

    fatal: DinorayError | None = None

    def __init__(self, placements: PlacementGroupRegistry, tell: Callable[[str], None]) -> None:
        self._placements, self._tell = placements, tell

    def on_trial_start(
        self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Tune's hook, before each attempt."""
        self._placements.clear(str(trial))

    def on_trial_recover(
        self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Tune's hook, after an attempt that was not the last."""
        self._tell(f"trial {trial}  failed ({_cause(trial)}), is started again")

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
        self._placements.clear(str(trial))
        self.ended(trial, _cause(trial))

    def ended(self, trial: TuneTrial, error: str | None) -> None:
        """Handle the end of a trial; `error` is set if it failed for good."""
        raise TypeError(f"{type(self).__name__} does not say what the end of {trial} means")


def _cause(trial: TuneTrial) -> str:
    """Return the last line of the trial's error from Tune's local file; the storage gets it later."""
    try:
        lines = Path(trial.error_file).read_text().strip().splitlines()
    except (OSError, TypeError):
        lines = []
    return lines[-1].strip()[:300] if lines else "its process was lost"


class _Stopper(NotPickled, tune.Stopper):
    """Stops all trials once the listener has recorded a fatal error, or `check`, called many times, raises one."""

    def __init__(self, listener: TrialListener, check: Callable[[], None]) -> None:
        self._listener, self._check = listener, check

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        try:
            self._check()
        except DinorayError as error:
            self._listener.fatal = self._listener.fatal or error
        return self._listener.fatal is not None


def tell_error(error: DinorayError) -> None:
    """Report an error that would affect every trial, from inside a trial: a raised error would be retried."""
    tune.report({"error": str(error), "exit_code": error.exit_code})


def run_tune(
    trainable: Callable[[dict[str, Any]], None],
    listener: "TrialListener",
    config: tune.TuneConfig,
    *,
    study: Directory,
    max_failures: int,
    check: Callable[[], None],
    space: Mapping[str, Any] | None = None,
) -> None:
    """Run Tune to its end, its records in the study's folder `ray`; raise the listener's fatal error, or `check`'s."""
    # Ctrl-C ends the study like any job; trials write their own records, and the console output is ours.
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the listener prints one line per error
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may collapse before its first evaluation
        # Written only at start and end: Tune uploads its state while writing it, and logs a traceback if a
        # file was renamed meanwhile.
        "TUNE_GLOBAL_CHECKPOINT_S": "inf",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    # This state is never read, so warnings that it was not saved are noise.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
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
            stop=_Stopper(listener, check),
            callbacks=[listener],
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    ).fit()
    if listener.fatal is not None:
        raise listener.fatal
