"""Summary of a study: the best parameters with their certainty, ties, important settings, cost.

All functions take the trials and study.json, at any time of the study. study/page/study_report.py writes the
files and pages.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinoray.pipeline.study.findings import sentences as in_words
from dinoray.pipeline.study.findings.agreement import Agreement, agreement
from dinoray.pipeline.study.findings.ranking import (
    Candidate,
    domains,
    is_population,
    number_of,
    place_in,
    ranked,
    score_of,
    searched,
)
from dinoray.pipeline.study.findings.statistics import explained, quantile_groups
from dinoray.pipeline.study.space import Domain
from dinoray.pipeline.study.trials import TrialRecord
from dinoray.pipeline.tracking.start import gain_of, start_of

_MIN_FOR_IMPORTANCE = 8
_STATUSES = ("finished", "stopped", "collapsed", "failed", "unfinished")


@dataclass(frozen=True)
class Hours:
    """Reserved hours."""

    cpu: float = 0.0
    gpu: float = 0.0


@dataclass(frozen=True)
class Saving:
    """Trained steps compared with running every trial to its end, without failed and running trials."""

    steps_trained: int
    steps_full: int
    by_collapse: Hours
    """Hours saved by ending collapsed trials."""
    by_stopping: Hours
    """Hours saved by early-stopping worse trials."""

    @property
    def share(self) -> float:
        """Return the saved share of the steps, 0 to 1."""
        return 1 - self.steps_trained / self.steps_full if self.steps_full else 0.0


@dataclass(frozen=True)
class Cost:
    """Cost of the study so far."""

    reserved: Hours
    seconds: float
    """Wall-clock time."""
    start_share: float
    """Share of the trials' time before their first steps, 0 to 1."""


@dataclass(frozen=True)
class Findings:
    """All findings of a study."""

    objective: str
    space: dict[str, Domain]
    best: Candidate | None
    candidates: list[Candidate]
    """All candidates, best first."""
    ties: list[Candidate]
    """Candidates that tie with the best."""
    kendall: list[Agreement]
    importance: dict[str, float] | None
    """Share of the ranks' variance explained by each setting alone, largest first; None: too few trials."""
    saving: Saving
    cost: Cost
    counts: dict[str, int]
    """Number of trials by status, and `all` and `reruns`."""
    verdicts: dict[str, int]
    """Number of collapsed trials by verdict."""
    gains: dict[int, float]
    """Number of a finished trial -> its last k-NN accuracy minus that before its first step."""
    words: list[str]
    """Findings as plain sentences."""
    is_population: bool = False
    """True if stopped trials were replaced by other members of a population."""


def findings(tried: Sequence[TrialRecord], study: Mapping[str, Any]) -> Findings:
    """Return the findings from these trials: none, half of a study, or all collapsed."""
    objective = str(study.get("objective") or "score")
    space = domains(study, tried)
    candidates = ranked(tried)
    best = next((c for c in candidates if c.standing == "best"), None)
    counts = {status: sum(one.status == status for one in tried) for status in _STATUSES}
    counts |= {"all": len(tried), "reruns": len(tried) - len(searched(tried))}
    verdicts = Counter(one.outcome.verdict for one in tried if one.outcome and one.status == "collapsed")
    agreements = agreement(tried, objective)
    importance, gains = importance_of(tried, space), gains_of(tried)
    saving = saving_of(tried, _count(study.get("total_steps")))
    scored = len(_scored(tried))
    words = [
        *in_words.best(tried, candidates, objective),
        *in_words.gain(best, gains),
        *in_words.counted(counts, dict(verdicts.most_common()), is_population=is_population(tried)),
        *in_words.regions(tried, space),
        *in_words.agreements([a for a in agreements if not a.with_collapsed], objective),
        *in_words.influence(importance, scored),
        *in_words.caveats(objective, space),
        *in_words.open_questions(tried, best, space, least=_MIN_FOR_IMPORTANCE, scored=scored),
        *in_words.savings(saving.share, saving.by_collapse.cpu, saving.by_stopping.cpu),
    ]
    return Findings(
        objective=objective,
        space=space,
        best=best,
        candidates=candidates,
        ties=[c for c in candidates if c.standing == "tie"],
        kendall=agreements,
        importance=importance,
        saving=saving,
        cost=cost_of(tried, _hours(study.get("seconds"))),
        counts=counts,
        verdicts=dict(verdicts.most_common()),
        gains=gains,
        words=words,
        is_population=is_population(tried),
    )


def gains_of(tried: Sequence[TrialRecord]) -> dict[int, float]:
    """Return how far the k-NN accuracy of finished trials is above the weights that each started from."""
    found = {}
    for one in tried:
        start = start_of(one.records.lines)
        if (
            start is None
            or one.outcome is None
            or one.status != "finished"
            or one.trial.continues is not None
        ):
            continue
        if (above := gain_of(start, {"step": one.outcome.step, **one.outcome.scores})) is not None:
            found[one.trial.number] = above.difference
    return found


def _scored(tried: Sequence[TrialRecord]) -> list[tuple[TrialRecord, float]]:
    """Return trials with a score; collapsed trials get a score below all others."""
    found = [
        (one, -math.inf if one.status == "collapsed" else score)
        for one in searched(tried)
        if (score := score_of(one)) is not None or one.status == "collapsed"
    ]
    return [(one, score) for one, score in found if score is not None]


def importance_of(tried: Sequence[TrialRecord], space: Mapping[str, Domain]) -> dict[str, float] | None:
    """Return the share of the variance of the scores' ranks between values of each setting.

    None below 8 trials, or if all scores are equal. Each setting is taken alone: the shares omit
    interactions.
    """
    scored = _scored(tried)
    if len(scored) < _MIN_FOR_IMPORTANCE or len({score for _, score in scored}) < 2:
        return None
    found = {}
    for key, domain in space.items():
        known = [
            (place, score)
            for one, score in scored
            if (place := place_in(domain, one.trial.params.get(key))) is not None
        ]
        places = [place for place, _ in known]
        if len(known) >= _MIN_FOR_IMPORTANCE and len(set(places)) > 1:
            few = domain.kind == "choice" or len(set(places)) <= 4
            groups = (
                [sorted(set(places)).index(place) for place in places] if few else quantile_groups(places)
            )
            found[key] = explained(groups, [score for _, score in known])
    return dict(sorted(found.items(), key=lambda item: -item[1])) or None


def saving_of(tried: Sequence[TrialRecord], total_steps: int) -> Saving:
    """Return the cost saved by ending trials early, at each trial's own pace, or else at the mean pace."""
    ended = [one for one in tried if one.outcome and one.status in ("finished", "stopped", "collapsed")]
    steps = sum(_count(one.outcome.step) - one.trial.from_step for one in ended if one.outcome)
    if any(one.trial.continues is not None for one in tried):  # in a population each member trains to the end
        return Saving(steps, steps, Hours(0.0, 0.0), Hours(0.0, 0.0))
    paces = {one.trial.number: _pace(one) for one in ended}
    known = [pace for pace in paces.values() if pace]
    num = max(1, len(known))
    usual = Hours(sum(pace.cpu for pace in known) / num, sum(pace.gpu for pace in known) / num)

    def saved(status: str) -> Hours:
        cpu = gpu = 0.0
        for one in ended:
            if one.status == status and one.outcome:
                rest = max(0, total_steps - _count(one.outcome.step))
                pace = paces[one.trial.number] or usual
                cpu, gpu = cpu + rest * pace.cpu, gpu + rest * pace.gpu
        return Hours(cpu, gpu)

    # A finished trial counts as complete whatever the length of others: the batch size may be searched.
    full = sum(
        _count(one.outcome.step) if one.status == "finished" else max(_count(one.outcome.step), total_steps)
        for one in ended
        if one.outcome
    )
    return Saving(steps, full, saved("collapsed"), saved("stopped"))


def _pace(one: TrialRecord) -> Hours | None:
    """Return the hours per step, without the start."""
    outcome = one.outcome
    if outcome is None or _count(outcome.step) < 1:
        return None
    seconds, start = _hours(outcome.seconds), _hours(outcome.start_seconds)
    training = 1 - min(1.0, start / seconds) if seconds > 0 else 1.0
    per_step = training / max(1, outcome.step - one.trial.from_step)
    return Hours(_hours(outcome.cpu_hours) * per_step, _hours(outcome.gpu_hours) * per_step)


def cost_of(tried: Sequence[TrialRecord], seconds: float) -> Cost:
    """Return the cost of all ended trials, including failed trials."""
    outcomes = [one.outcome for one in tried if one.outcome]
    total = sum(_hours(o.seconds) for o in outcomes)
    return Cost(
        reserved=Hours(
            sum(_hours(o.cpu_hours) for o in outcomes), sum(_hours(o.gpu_hours) for o in outcomes)
        ),
        seconds=seconds,
        start_share=min(1.0, sum(_hours(o.start_seconds) for o in outcomes) / total) if total > 0 else 0.0,
    )


def _hours(value: Any) -> float:
    """Return a time as a number; 0 if a damaged file holds none."""
    return max(0.0, number_of(value) or 0.0)


def _count(value: Any) -> int:
    return int(_hours(value))
