"""Ray Tune as both kinds of search use it (tuning.py, population.py): started, listened to, and stopped.

Trials run as Tune's functions in processes on the head, where no work is done and no spot node takes them with it.
Nothing of Tune's own state is ever read again: pipeline/study/trials.py is what a study continues from.
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

from models.errors import DinorayError, error_of
from pipeline.cluster.channel import actor_here
from pipeline.storage.files import Directory, filesystem

_ON_HEAD = "node:__internal_head__"


class Unsaved:
    """Tune pickles what it is given, to restore it later. Ours is not: it holds the driver's console and files."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Placements:
    """Where the workers of trials are: the driver removes what the process of a trial cannot, because it was killed.

    Ray Train leaves it to the dashboard, which there may not be.
    """

    def __init__(self) -> None:
        self._actor = actor_here(_Groups)

    def keep(self, name: str, group: PlacementGroup) -> None:
        """The workers of the trial of this name are there now."""
        self._actor.keep.remote(name, group)

    def clear(self, name: str) -> None:
        """Remove the group that is known of the trial, with what is in it; one that is gone is no error."""
        group = ray.get(self._actor.take.remote(name))
        if group is not None:
            remove_placement_group(group)


def remove_left_group(group_id: str) -> None:
    """Remove the placement group of this hexadecimal id, if it is there: a killed driver's may outlive it."""
    if ray.util.placement_group_table().get(group_id, {}).get("state") not in (None, "REMOVED"):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


class _Groups:
    def __init__(self) -> None:
        self._groups: dict[str, PlacementGroup] = {}

    def keep(self, name: str, group: PlacementGroup) -> None:
        self._groups[name] = group

    def take(self, name: str) -> PlacementGroup | None:
        return self._groups.pop(name, None)


class Listener(Unsaved, tune.Callback):
    """Hears of the ends of trials, and of an error that concerns them all: it ends the study.

    What an attempt has left that was killed is removed before the next one, and after the last.
    """

    fatal: DinorayError | None = None

    def __init__(self, placements: Placements, tell: Callable[[str], None]) -> None:
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
        """A trial has ended, or failed for good with this error."""
        raise TypeError(f"{type(self).__name__} does not say what the end of {trial} means")


def _cause(trial: TuneTrial) -> str:
    """The last line of what Tune wrote down of the trial's error: on this machine, the storage has it later."""
    try:
        lines = Path(trial.error_file).read_text().strip().splitlines()
    except (OSError, TypeError):
        lines = []
    return lines[-1].strip()[:300] if lines else "its process was lost"


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
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the listener tells of them, in a line each
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may collapse before it is first evaluated
        # Written at the start and at the end only: Tune uploads its state beside writing it, and complains with a
        # traceback when a file has been renamed meanwhile.
        "TUNE_GLOBAL_CHECKPOINT_S": "inf",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    # Nobody reads that state, so nobody needs to hear that it was not saved.
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
            stop=_Stopper(listener),
            callbacks=[listener],
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    ).fit()
    if listener.fatal is not None:
        raise listener.fatal
