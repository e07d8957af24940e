"""A search on a running Ray: trials as Tune functions that receive a stop decision at each evaluation.

The trial function and the proposals are arguments; this module connects them to Tune and ASHA. An
early-stopped trial ends by itself, with a checkpoint, and removes its workers and its placement group. Tune
would kill its process, and its child processes could then be removed only through the dashboard.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup

from dinoray.models.errors import DinorayError
from dinoray.pipeline.cluster.channel import actor_here
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.search.tuner import (
    NotPickled,
    PlacementGroupRegistry,
    TrialListener,
    run_tune,
    tell_error,
)
from dinoray.pipeline.study.trials import Trial

Course = Mapping[int, float]
"""Scores by step."""


@dataclass(frozen=True)
class AshaConfig:
    """ASHA: at `grace_steps` and each `factor` times as many, all but the best 1 in `factor` stop early."""

    grace_steps: int
    factor: float
    total_steps: int


class Report:
    """Reports of a trial, answered with a stop decision, at each evaluation."""

    def __init__(self, referee: Any, placements: PlacementGroupRegistry, trial: Trial) -> None:
        self._referee, self._placements, self._trial = referee, placements, trial

    def __call__(self, step: int, score: float, scores: Mapping[str, float]) -> bool:
        """Report an evaluation; return true if the trial continues."""
        tune.report({**scores, "step": step, "score": score})
        return ray.get(self._referee.decision.remote(self._trial.number, step))

    def placed(self, group: PlacementGroup) -> None:
        """Record the placement group of the workers, so that they do not outlive a dead trial."""
        self._placements.keep(self._trial.name, group)


TrialFunction = Callable[[Trial, Report], None]
"""Runs a trial until it ends in any way, and stores the outcome."""


@dataclass
class Search:
    """Interface to Tune: proposals, earlier scores, and callbacks on trials."""

    propose: Callable[[], Trial | None]
    """Return the next trial; None if there is none left."""
    on_end: Callable[[Trial, str | None], None]
    """Handle the end of a trial; the error is set if it failed for good."""
    tell: Callable[[str], None]
    """Print a message for the user."""
    ended: Mapping[int, Course] = field(default_factory=dict)
    """Evaluations of trials that ended before the study was resumed."""
    check: Callable[[], None] = lambda: None
    """Raise DinorayError where the study must end."""
    begun: Mapping[int, Course] = field(default_factory=dict)
    """Evaluations of trials that are proposed again, up to the step from which they resume."""


class _StopDecisions:
    """Passes decisions from the scheduler, in the driver, to the trials."""

    def __init__(self) -> None:
        self._decisions: defaultdict[tuple[int, int], asyncio.Future[bool]] = defaultdict(asyncio.Future)

    async def decide(self, number: int, step: int, should_continue: bool) -> None:
        if not self._decisions[number, step].done():
            self._decisions[number, step].set_result(should_continue)

    async def decision(self, number: int, step: int) -> bool:
        return await self._decisions[number, step]


def run_trials(
    search: Search,
    body: TrialFunction,
    *,
    study: Directory,
    num_trials: int,
    trials_at_once: int,
    halving: AshaConfig | None,
    max_failures: int,
) -> None:
    """Run at most `num_trials` proposed trials; raise DinorayError if an error concerns all trials."""
    referee = actor_here(_StopDecisions)
    placements = PlacementGroupRegistry()
    run_tune(
        _Trainable(body, referee, placements),
        _TrialListener(search, placements),
        tune.TuneConfig(
            num_samples=num_trials,
            max_concurrent_trials=trials_at_once,
            search_alg=_Proposals(search),
            scheduler=_Refereed(referee, halving, search),
            reuse_actors=True,
            trial_name_creator=lambda trial: trial_of(trial).name,
            trial_dirname_creator=lambda trial: trial_of(trial).name,
        ),
        study=study,
        max_failures=max_failures,
        check=search.check,
    )


def trial_of(trial: TuneTrial) -> Trial:
    """Return our trial of a Tune trial."""
    return Trial(**trial.config["trial"])


class _Trainable:
    """The function that Tune runs for a trial."""

    __name__ = "trial"

    def __init__(self, body: TrialFunction, referee: Any, placements: PlacementGroupRegistry) -> None:
        self._body, self._referee, self._placements = body, referee, placements

    def __call__(self, config: dict[str, Any]) -> None:
        trial = Trial(**config["trial"])
        try:
            self._body(trial, Report(self._referee, self._placements, trial))
        except DinorayError as error:
            tell_error(error)


class _Proposals(NotPickled, Searcher):
    """Tune's interface to `Search.propose`."""

    def __init__(self, search: Search) -> None:
        super().__init__(metric="score", mode="max")
        self._search = search

    def suggest(self, trial_id: str) -> Any:
        trial = self._search.propose()
        return Searcher.FINISHED if trial is None else {"trial": asdict(trial)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: the listener gets this event earlier."""

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb"):  # Tune needs the file; it is never read
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: nothing was saved."""


class _Refereed(NotPickled, FIFOScheduler):
    """First in, first out; ASHA's stop decisions are sent to the trials, which are not killed."""

    def __init__(self, referee: Any, halving: AshaConfig | None, search: Search) -> None:
        super().__init__()
        self._referee, self._begun = referee, search.begun
        self._asha = None
        if halving is not None and halving.grace_steps < halving.total_steps:
            self._asha = ASHAScheduler(
                time_attr="step",
                metric="score",
                mode="max",
                max_t=halving.total_steps,
                grace_period=halving.grace_steps,
                reduction_factor=halving.factor,
            )
            for number, course in search.ended.items():
                self._add(SimpleNamespace(trial_id=f"ended-{number}"), course)

    def _add(self, trial: Any, course: Course) -> None:
        """Add a trial to ASHA with its earlier decisions: each rung holds one of its scores."""
        if self._asha is not None:
            self._asha.on_trial_add(None, trial)
            for step, score in sorted(course.items()):
                self._asha.on_trial_result(None, trial, {"step": step, "score": score})

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._add(trial, self._begun.get(trial_of(trial).number, {}))

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        if "score" in result:
            action = TrialScheduler.CONTINUE
            if self._asha is not None:
                action = self._asha.on_trial_result(tune_controller, trial, result)
            should_continue = action == TrialScheduler.CONTINUE
            self._referee.decide.remote(trial_of(trial).number, result["step"], should_continue)
        return TrialScheduler.CONTINUE


class _TrialListener(TrialListener):
    def __init__(self, search: Search, placements: PlacementGroupRegistry) -> None:
        super().__init__(placements, search.tell)
        self._search = search

    def ended(self, trial: TuneTrial, error: str | None) -> None:
        self._search.on_end(trial_of(trial), error)
