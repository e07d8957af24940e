"""Remaining work of a study, and the observations for its next proposal, from its trials alone.

No Ray here.
"""

from collections.abc import Mapping, Sequence

from dinoray.models.errors import ConfigError, DinorayError
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_steps
from dinoray.pipeline.study.findings.ranking import searched
from dinoray.pipeline.study.objective import Objective
from dinoray.pipeline.study.search.samplers import Known
from dinoray.pipeline.study.space import Space, place
from dinoray.pipeline.study.trials import Trial, TrialRecord, evaluations, read_trials, trial_directory


def next_number(tried: Sequence[TrialRecord]) -> int:
    """Return the number of the next new trial."""
    return max((t.trial.number for t in tried), default=-1) + 1


def course(tried: TrialRecord, objective: Objective, *, up_to: int | None = None) -> Mapping[int, float]:
    """Return scores by step of evaluation, after the first step and up to `up_to`."""
    scored = {step: objective.score(scores) for step, scores in evaluations(tried.records).items()}
    return {
        step: score
        for step, score in scored.items()
        if score is not None and step and (up_to is None or step <= up_to)
    }


def committed_course(study: Directory, tried: TrialRecord, objective: Objective) -> Mapping[int, float]:
    """Return the scores of a resumed trial up to its last checkpoint, which it will not evaluate again."""
    steps = committed_steps(trial_directory(study, tried.trial))
    return course(tried, objective, up_to=max(steps, default=0))


def known(tried: Sequence[TrialRecord], objective: Objective, *, worst: float) -> list[Known]:
    """Return the trials as observations for a sampler; an early-stopped trial includes its scores by step.

    A failed trial has the `worst` score, so that similar parameters are not tried for ever.
    """
    found = []
    for nth, t in enumerate(searched(tried)):
        score = None if t.outcome is None else t.outcome.score
        found.append(
            Known(
                nth,
                t.trial.params,
                worst if t.status == "failed" else score,
                course(t, objective) if t.status == "stopped" else {},
            )
        )
    return found


def member_start(space: Space, trial: Trial) -> dict[str, float]:
    """Return the point where a member continues; raise ConfigError if it is outside a changed space."""
    for key, domain in space.items():
        if key not in trial.params or not domain.holds(trial.params[key]):
            where = f"is at {trial.params[key]!r}" if key in trial.params else "has none"
            raise ConfigError(
                f"tune.space: {key} {domain.kind}: {list(domain.values)}: trial {trial.name}, which goes on, {where}, "
                "and tune.scheduler=pb2 cannot leave the space; set it as it was, or another name=... to start anew"
            )
    return place(space, trial.params)


def check_any_ran(study: Directory) -> None:
    """Raise DinorayError if every ended trial failed: then the tried settings are not the cause."""
    outcomes = [t.outcome for t in read_trials(study) if t.outcome]
    if outcomes and all(outcome.status == "failed" for outcome in outcomes):
        first = " ".join(outcomes[0].message.split()) or "not recorded"
        raise DinorayError(
            f"all trials that ended ({len(outcomes)}) failed, the first with: {first}; they are not run again: mend "
            f"what it names, and search under another name=..., or remove {study.join('trials')}"
        )


def confirmations(tried: Sequence[TrialRecord], *, top: int, num_seeds: int) -> list[Trial]:
    """Return the trials still needed so that the best `top` finished candidates have all their seeds."""
    scored = [
        (t.outcome.score, t.trial) for t in searched(tried) if t.outcome and t.outcome.status == "finished"
    ]
    best = sorted(((score, trial) for score, trial in scored if score is not None), key=lambda x: -x[0])[:top]
    number, new = next_number(tried), list[Trial]()
    for _, trial in best:
        done = {t.trial.seed for t in tried if t.trial.confirms == trial.number}
        for seed in range(trial.seed + 1, trial.seed + num_seeds):
            if seed not in done:
                new.append(Trial(number + len(new), trial.params, seed, "confirm", trial.number))
    return new
