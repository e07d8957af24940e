"""Findings as plain sentences, each true for any study: no trial, one, all collapsed, no labels.

Each function yields the sentences on one subject, or none if there is nothing to report.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.study.findings.agreement import Agreement
from pipeline.study.findings.ranking import Candidate, place_in, searched
from pipeline.study.findings.regions import collapse_regions, good_trials, ranges, short
from pipeline.study.findings.statistics import chance_share, chance_tau
from pipeline.study.space import Domain
from pipeline.study.trials import Tried
from pipeline.training.verdict import Verdict

_EDGE = 0.02
_MAX_NAMES = 8
_MAX_MESSAGE = 200
_NAMES = {"rankme": "RankMe", "lidar": "LiDAR", "loss": "loss", "entropy_ratio": "teacher entropy / ln K"}
_PART_OF_THE_LOSS = ("loss.", "head.out_dim")


def metric_name(metric: str) -> str:
    """Return the readable name of a metric."""
    if metric.startswith("knn_"):
        return f"k-NN (k={metric.removeprefix('knn_')})"
    return _NAMES.get(metric, metric)


def score_text(metric: str, score: float) -> str:
    """Format a score as its metric: accuracies in percent, the loss with its own sign."""
    if metric.startswith("knn_"):
        return f"{score:.1%}"
    return f"{-score if metric == 'loss' else score:.4g}"


def spread_text(metric: str, std: float) -> str:
    """Format a difference of scores, in the unit of `score_text`."""
    return f"{100 * std:.1f}" if metric.startswith("knn_") else f"{std:.2g}"


def result_text(metric: str, candidate: Candidate) -> str:
    """Format mean, spread and number of seeds."""
    score = score_text(metric, candidate.mean)
    if candidate.std is None:
        return score
    return f"{score} ± {spread_text(metric, candidate.std)} over {len(candidate.scores)} seeds"


def params_text(params: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Format the settings that were searched."""
    return ", ".join(f"{key} {short(params[key])}" for key in keys if key in params)


def plural(number: int, what: str) -> str:
    """Format a count with its noun: 1 trial, 2 trials."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """Format a list as `a, b and c`, truncated if it is long."""
    if len(parts) > _MAX_NAMES:
        parts = [*parts[:_MAX_NAMES], f"{len(parts) - _MAX_NAMES} more"]
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def stopped_for(*, is_population: bool) -> str:
    """Return the reason for which trials were stopped."""
    return "replaced by ones that went on from better ones" if is_population else "given up for better ones"


def counted(
    counts: Mapping[str, int], verdicts: Mapping[str, int], *, is_population: bool = False
) -> Iterator[str]:
    """Yield the number of trials by status."""
    if not counts["all"]:
        yield "No trial has been started yet."
        return
    kinds = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    parts = [
        (counts["finished"], "trained to the end"),
        (counts["stopped"], stopped_for(is_population=is_population)),
        (counts["collapsed"], f"collapsed ({kinds})"),
        (counts["failed"], "failed with an error"),
        (counts["unfinished"], "not ended yet"),
    ]
    reruns = f", {counts['reruns']} of them under another seed" if counts["reruns"] else ""
    told = ", ".join(f"{number} {what}" for number, what in parts if number)
    yield f"{plural(counts['all'], 'trial')}{reruns}: {told}."


def best(tried: Sequence[Tried], candidates: Sequence[Candidate], objective: str) -> Iterator[str]:
    """Yield the best parameters and their certainty, or the reason why there are none."""
    ended = [one for one in tried if one.outcome]
    winner = next((c for c in candidates if c.standing == "best"), None)
    if winner is None:
        yield from _nothing_won(ended, candidates)
        return
    keys = list(winner.params)
    settings = params_text(winner.params, keys)
    told = f"Best is trial {winner.name}{f' ({settings})' if settings else ''}: {metric_name(objective)}"
    if not winner.is_confirmed:
        rival = (
            ""
            if sum(not c.collapsed for c in candidates) > 1
            else ", the only one that was trained to the end"
        )
        yield f"{told} {score_text(objective, winner.mean)} with one seed{rival}: not confirmed."
    else:
        yield f"{told} {result_text(objective, winner)}."
        yield from _compared(winner, candidates, objective)
    origin = next((one.trial for one in tried if one.trial.number == winner.number), None)
    if origin is not None and origin.continues is not None:
        yield (
            f"It went on from trial {origin.continues:04d} at step {origin.from_step}, with other settings: best.yaml "
            "has its last ones alone, which were not trained from the start."
        )
    for candidate in candidates:
        if candidate.standing == "collapsed":
            others = listed([f"{number:04d}" for number in candidate.collapsed])
            yield (
                f"Trial {candidate.name} does not count, with {score_text(objective, candidate.mean)}: under another "
                f"seed it collapsed ({others})."
            )


def _nothing_won(ended: Sequence[Tried], candidates: Sequence[Candidate]) -> Iterator[str]:
    collapsed = [one for one in ended if one.status == "collapsed"]
    failed = [one for one in ended if one.status == "failed"]
    everything = "the only trial that ended" if len(ended) == 1 else f"all {len(ended)} trials that ended"
    if candidates:
        yield "There is no best: all that was trained to the end collapsed under another seed."
    elif collapsed and len(collapsed) == len(ended):
        yield f"There is no best: {everything} collapsed."
    elif failed and len(failed) == len(ended):
        yield f"Nothing was measured: {everything} failed."
    elif ended:
        yield "There is no best: no trial was trained to the end with a score that is a number."
    for verdict in dict.fromkeys(one.outcome.verdict for one in collapsed if one.outcome):
        if verdict in {v.value for v in Verdict} and Verdict(verdict).remedy:
            yield f"{verdict.capitalize()}: {Verdict(verdict).remedy}."


def _compared(winner: Candidate, candidates: Sequence[Candidate], objective: str) -> Iterator[str]:
    ties = [c for c in candidates if c.standing == "tie"]
    behind = [c for c in candidates if c.standing == "behind"]
    if ties:
        number = "them" if len(ties) > 1 else "it"
        yield (
            f"Trial{'s' if len(ties) > 1 else ''} {listed([c.name for c in ties])} tie{'' if len(ties) > 1 else 's'} "
            f"with it: seeds make as much of a difference as lies between {number} and the best (90 % interval of the "
            "difference, spread pooled over all that were rerun)."
        )
    if behind:
        yield f"It is ahead of {listed([c.name for c in behind])} by more than seeds make."
    if not ties and not behind:
        yield "Nothing else was run with several seeds, so nothing was compared with it beyond one seed."
    higher = [c.name for c in candidates if c.standing == "not confirmed" and c.mean > winner.mean]
    if higher:
        yield f"{listed(higher)} scored higher with one seed, which was not confirmed."


def regions(tried: Sequence[Tried], space: Mapping[str, Domain]) -> Iterator[str]:
    """Yield the regions in which trials collapse, and the ranges of good values."""
    collapsed = [one for one in tried if one.status == "collapsed"]
    others = [one for one in tried if one.status in ("finished", "stopped")]
    told: set[int] = set()
    for region in collapse_regions(tried, space):
        told |= set(region.trials)
        yield f"All {len(region.trials)} trials with {region} collapsed ({listed(region.verdicts)})."
    rest = [one.trial.name for one in collapsed if one.trial.number not in told]
    if rest and others:
        yield (
            f"{listed(rest)} collapsed as well."
            if told
            else f"{listed(rest)} collapsed; no border of it is seen."
        )
    if others and not collapsed:
        yield "No trial collapsed."
    good = good_trials(tried)
    found = ranges(good, space)
    if found:
        inside = "; ".join(f"{key} {value}" for key, value in found.items())
        yield f"The better half of the trials that were trained to the end ({len(good)}) lie within: {inside}."


def agreements(found: Sequence[Agreement], objective: str) -> Iterator[str]:
    """Yield the agreement of metrics, limited to metrics with a tau over more than two trials."""
    told = [a for a in found if a.tau is not None and a.num_trials > 2]
    if not told:
        return
    num = min(a.num_trials for a in told)
    taus = ", ".join(f"{metric_name(a.metric)} {a.tau:+.2f}" for a in told)
    yield (
        f"Against {metric_name(told[0].against)} over {num} trials, Kendall's tau is: {taus} (1 is the same order, -1 "
        f"the opposite; within ±{chance_tau(num):.2f} it may be chance)."
    )


def influence(importance: Mapping[str, float] | None, scored: int) -> Iterator[str]:
    """Yield the influence of each setting, from `scored` trials with a score."""
    if not importance:
        return
    chance = chance_share(scored)
    told = [f"{key} {share:.0%}" for key, share in importance.items() if share > chance]
    little = [key for key, share in importance.items() if share <= chance]
    if not told:
        yield f"No setting by itself explains more of the differences in rank than chance does in {scored} trials."
        return
    rest = f"; {listed(little)} no more than chance does" if little else ""
    yield f"Of the differences in rank is explained by one setting alone: {listed(told)}{rest}."


def caveats(objective: str, space: Mapping[str, Domain]) -> Iterator[str]:
    """Yield the limitations of the objective."""
    if objective in ("rankme", "lidar"):
        yield (
            f"{metric_name(objective)} stood in for labels: a high rank of the features is necessary for good "
            "ones, not sufficient; look at the best ones by k-NN on a few labelled images."
        )
    moved = [key for key in space if key.startswith(_PART_OF_THE_LOSS)]
    if objective == "loss" and moved:
        yield f"The loss was the objective, and {listed(moved)} move it whatever is learnt: the order may mean nothing."


def open_questions(
    tried: Sequence[Tried], best: Candidate | None, space: Mapping[str, Domain], *, least: int, scored: int
) -> Iterator[str]:
    """Yield the questions that the study leaves open."""
    unfinished = sum(one.status == "unfinished" for one in tried)
    if unfinished:
        yield f"{plural(unfinished, 'trial')} did not end yet: all this may change."
    if 0 < scored < least:
        yield f"Which setting matters is not said below {least} trials with a score ({scored} so far)."
    for key, domain in space.items() if best else ():
        value = best.params.get(key) if best else None
        place = place_in(domain, value)
        if domain.kind == "choice" or place is None:
            continue
        low, high = domain.values
        at_end = value <= low or value >= high or (domain.is_continuous and min(place, 1 - place) <= _EDGE)
        if at_end:
            where = "at the edge of" if low <= value <= high else "outside of"
            remedy = "widen it there" if where == "at the edge of" else "include it"
            span = f"{short(low)} to {short(high)}"
            yield f"The best has {key} {short(value)}, {where} what was searched, {span}: {remedy}."
    failed = [one for one in searched(tried) if one.status == "failed"] or [
        o for o in tried if o.status == "failed"
    ]
    if failed:
        message = " ".join((failed[0].outcome.message if failed[0].outcome else "").split())
        message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
        yield f"The first error, of trial {failed[0].trial.name}: {message or 'not recorded'}"


def savings(share: float, by_collapse: float, by_stopping: float) -> Iterator[str]:
    """Yield the savings from ending trials early; `by_...` in CPU-hours."""
    if share >= 0.005:
        yield (
            f"Ending trials early saved {share:.0%} of the steps: {by_collapse:.3g} CPU-hours of collapsed ones, "
            f"{by_stopping:.3g} of ones that had fallen behind."
        )
