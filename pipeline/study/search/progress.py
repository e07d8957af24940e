"""What is left to do in a study, and what its next proposal may know: from its trials alone. No Ray here."""

from collections.abc import Mapping, Sequence

from models.errors import ConfigError, DinorayError
from pipeline.storage.files import Directory
from pipeline.storage.run_dir import committed_steps
from pipeline.study.findings.ranking import searched
from pipeline.study.objective import Objective
from pipeline.study.search.samplers import Known
from pipeline.study.space import Space, place
from pipeline.study.trials import Trial, Tried, evaluations, read_trials, trial_directory


def next_number(tried: Sequence[Tried]) -> int:
    """Of the next new trial."""
    return max((t.trial.number for t in tried), default=-1) + 1


def course(tried: Tried, objective: Objective, *, up_to: int | None = None) -> Mapping[int, float]:
    """Scores by step at which the trial was evaluated, after the first step, and not after `up_to`."""
    scored = {step: objective.score(scores) for step, scores in evaluations(tried.records).items()}
    return {
        step: score
        for step, score in scored.items()
        if score is not None and step and (up_to is None or step <= up_to)
    }


def committed_course(study: Directory, tried: Tried, objective: Objective) -> Mapping[int, float]:
    """Of a trial that goes on from its last checkpoint, what it will not evaluate again."""
    steps = committed_steps(trial_directory(study, tried.trial))
    return course(tried, objective, up_to=max(steps, default=0))


def known(tried: Sequence[Tried], objective: Objective, *, worst: float) -> list[Known]:
    """The search as a sampler sees it: a failed trial has the `worst` score, so that its like is not tried for ever.

    One that was given up says how far it was.
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
    """Where a member of a population goes on from; ConfigError where the space has changed and it is not in it."""
    for key, domain in space.items():
        if key not in trial.params or not domain.holds(trial.params[key]):
            where = f"is at {trial.params[key]!r}" if key in trial.params else "has none"
            raise ConfigError(
                f"tune.space: {key} {domain.kind}: {list(domain.values)}: trial {trial.name}, which goes on, {where}, "
                "and tune.scheduler=pb2 cannot leave the space; set it as it was, or another name=... to start anew"
            )
    return place(space, trial.params)


def check_any_ran(study: Directory) -> None:
    """DinorayError where every trial that ended has failed: it is not the settings that were tried."""
    outcomes = [t.outcome for t in read_trials(study) if t.outcome]
    if outcomes and all(outcome.status == "failed" for outcome in outcomes):
        first = " ".join(outcomes[0].message.split()) or "not recorded"
        raise DinorayError(
            f"all trials that ended ({len(outcomes)}) failed, the first with: {first}; they are not run again: mend "
            f"what it names, and search under another name=..., or remove {study.join('trials')}"
        )


def confirmations(tried: Sequence[Tried], *, top: int, num_seeds: int) -> list[Trial]:
    """Trials that are still to be made so that the best `top` of those that finished have all their seeds."""
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
