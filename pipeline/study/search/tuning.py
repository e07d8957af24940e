"""A search on a Ray that is up: trials as Tune's functions, each at its evaluations told whether it goes on.

What a trial does is handed in, and so is what is proposed: this file brings them to Tune, and ASHA to them. A trial
that is given up is told so and ends by itself, with a checkpoint, its workers and its placement group gone: Tune
would kill its process, and what that had started could then only be cleaned up through the dashboard.
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

from models.errors import DinorayError
from pipeline.cluster.channel import actor_here
from pipeline.storage.files import Directory
from pipeline.study.search.tuner import Listener, Placements, Unsaved, run_tune, tell_error
from pipeline.study.trials import Trial

Course = Mapping[int, float]
"""Scores by step."""


@dataclass(frozen=True)
class Halving:
    """ASHA: at `grace_steps` and each `factor` times as many, all but the best of 1 in `factor` are given up."""

    grace_steps: int
    factor: float
    total_steps: int


class Report:
    """What a trial tells, and is told, at each evaluation."""

    def __init__(self, referee: Any, placements: Placements, trial: Trial) -> None:
        self._referee, self._placements, self._trial = referee, placements, trial

    def __call__(self, step: int, score: float, scores: Mapping[str, float]) -> bool:
        """Tell of an evaluation; whether the trial goes on."""
        tune.report({**scores, "step": step, "score": score})
        return ray.get(self._referee.decision.remote(self._trial.number, step))

    def placed(self, group: PlacementGroup) -> None:
        """Tell where the workers are, so that they do not outlive a trial that dies."""
        self._placements.keep(self._trial.name, group)


Body = Callable[[Trial, Report], None]
"""Runs a trial to its end, in whatever way it ends, and remembers the outcome."""


@dataclass
class Search:
    """What Tune asks for and tells of: proposals, the past, and what becomes of trials."""

    propose: Callable[[], Trial | None]
    """The next trial; None when there is none left."""
    on_end: Callable[[Trial, str | None], None]
    """A trial has ended, or failed for good with this error."""
    tell: Callable[[str], None]
    """A person should hear this."""
    ended: Mapping[int, Course] = field(default_factory=dict)
    """Evaluations of trials that have ended in an earlier life of the study."""
    begun: Mapping[int, Course] = field(default_factory=dict)
    """Those of trials that are proposed again, up to where they continue."""


class _Referee:
    """Carries decisions from the scheduler, in the driver, to the trials."""

    def __init__(self) -> None:
        self._decisions: defaultdict[tuple[int, int], asyncio.Future[bool]] = defaultdict(asyncio.Future)

    async def decide(self, number: int, step: int, goes_on: bool) -> None:
        if not self._decisions[number, step].done():
            self._decisions[number, step].set_result(goes_on)

    async def decision(self, number: int, step: int) -> bool:
        return await self._decisions[number, step]


def run_trials(
    search: Search,
    body: Body,
    *,
    study: Directory,
    num_trials: int,
    trials_at_once: int,
    halving: Halving | None,
    max_failures: int,
) -> None:
    """Run the trials that are proposed, `num_trials` at most. DinorayError where a trial's error concerns them all."""
    referee = actor_here(_Referee)
    placements = Placements()
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
    )


def trial_of(trial: TuneTrial) -> Trial:
    """Ours, of Tune's."""
    return Trial(**trial.config["trial"])


class _Trainable:
    """The function that Tune runs."""

    __name__ = "trial"

    def __init__(self, body: Body, referee: Any, placements: Placements) -> None:
        self._body, self._referee, self._placements = body, referee, placements

    def __call__(self, config: dict[str, Any]) -> None:
        trial = Trial(**config["trial"])
        try:
            self._body(trial, Report(self._referee, self._placements, trial))
        except DinorayError as error:
            tell_error(error)


class _Proposals(Unsaved, Searcher):
    """Tune's side of `Search.propose`."""

    def __init__(self, search: Search) -> None:
        super().__init__(metric="score", mode="max")
        self._search = search

    def suggest(self, trial_id: str) -> Any:
        trial = self._search.propose()
        return Searcher.FINISHED if trial is None else {"trial": asdict(trial)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The listener is told as well, and sooner."""

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb"):  # Tune wants the file; nobody reads it
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class _Refereed(Unsaved, FIFOScheduler):
    """First come, first served; ASHA says who goes on, and the trial is told instead of killed."""

    def __init__(self, referee: Any, halving: Halving | None, search: Search) -> None:
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
        """Make a trial known, with what was decided on already: each rung has one score of it."""
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
            goes_on = action == TrialScheduler.CONTINUE
            self._referee.decide.remote(trial_of(trial).number, result["step"], goes_on)
        return TrialScheduler.CONTINUE


class _TrialListener(Listener):
    def __init__(self, search: Search, placements: Placements) -> None:
        super().__init__(placements, search.tell)
        self._search = search

    def ended(self, trial: TuneTrial, error: str | None) -> None:
        self._search.on_end(trial_of(trial), error)
