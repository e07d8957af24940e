"""Findings as plain sentences, each true for any study: no trial, one, all collapsed, no labels.

Each function yields the sentences on one subject, or none if there is nothing to report.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinoray.models.counts import count
from dinoray.pipeline.study.findings.agreement import Agreement
from dinoray.pipeline.study.findings.ranking import Candidate, place_in, searched
from dinoray.pipeline.study.findings.regions import collapse_regions, good_trials, ranges, short
from dinoray.pipeline.study.findings.statistics import chance_share, sample_std
from dinoray.pipeline.study.space import Domain
from dinoray.pipeline.study.trials import TrialRecord
from dinoray.pipeline.tracking.rankings import chance_tau
from dinoray.pipeline.tracking.start import LABEL_FREE_NAMES
from dinoray.pipeline.training.verdict import Verdict

_EDGE = 0.02
_MAX_NAMES = 8
_MAX_MESSAGE = 200
_NAMES = {**LABEL_FREE_NAMES, "clid": "CLID", "loss": "loss", "entropy_ratio": "teacher entropy / ln K"}
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


def gain_text(gains: Sequence[float]) -> str:
    """Format the k-NN above the start, over seeds: `+3.2 ± 0.8`, of one seed `+3.2`; empty if there is none."""
    if not gains:
        return ""
    std = sample_std(gains)
    return f"{100 * sum(gains) / len(gains):+.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def gain(best: Candidate | None, gains: Mapping[int, float]) -> Iterator[str]:
    """Yield by how much the best parameters beat the weights that their runs started from, and over how many seeds."""
    if best is None or not (found := [gains[number] for number in best.trials if number in gains]):
        return
    seeds = "with one seed" if len(found) == 1 else f"over {len(found)} seeds (mean ± standard deviation)"
    yield f"The last k-NN of trial {best.name} minus that of its start is {gain_text(found)} points, {seeds}."


def params_text(params: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Format the settings that were searched."""
    return ", ".join(f"{key}={short(params[key])}" for key in keys if key in params)


def listed(parts: Sequence[str]) -> str:
    """Format a list as `a, b and c`, truncated if it is long."""
    if len(parts) > _MAX_NAMES:
        parts = [*parts[:_MAX_NAMES], f"{len(parts) - _MAX_NAMES} more"]
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def named(trials: Sequence[str]) -> str:
    """Return the names of trials as the start of a sentence."""
    return f"Trial{'' if len(trials) == 1 else 's'} {listed(trials)}"


def stopped_for(*, is_population: bool) -> str:
    """Return the reason for which trials were stopped."""
    return "replaced by copies of better trials" if is_population else "early-stopped"


def counted(
    counts: Mapping[str, int], verdicts: Mapping[str, int], *, is_population: bool = False
) -> Iterator[str]:
    """Yield the number of trials by status."""
    if not counts["all"]:
        yield "No trial has been started yet."
        return
    kinds = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    parts = [
        (counts["finished"], "finished"),
        (counts["stopped"], stopped_for(is_population=is_population)),
        (counts["collapsed"], f"collapsed ({kinds})"),
        (counts["failed"], "failed with an error"),
        (counts["unfinished"], "unfinished"),
    ]
    reruns = f" (including {count(counts['reruns'], 'rerun')} with another seed)" if counts["reruns"] else ""
    told = ", ".join(f"{number} {what}" for number, what in parts if number)
    yield f"{count(counts['all'], 'trial')}{reruns}: {told}."


def best(tried: Sequence[TrialRecord], candidates: Sequence[Candidate], objective: str) -> Iterator[str]:
    """Yield the best parameters and their certainty, or the reason why there are none."""
    ended = [one for one in tried if one.outcome]
    winner = next((c for c in candidates if c.standing == "best"), None)
    if winner is None:
        yield from _nothing_won(ended, candidates)
        return
    keys = list(winner.params)
    settings = params_text(winner.params, keys)
    told = f"The best trial is {winner.name}{f' ({settings})' if settings else ''}: {metric_name(objective)}"
    if not winner.is_confirmed:
        is_alone = sum(not c.collapsed for c in candidates) == 1
        rivals = " No other trial finished without a collapse." if is_alone else ""
        yield (
            f"{told} {score_text(objective, winner.mean)} with one seed, not confirmed by other seeds.{rivals}"
        )
    else:
        yield f"{told} {result_text(objective, winner)}."
        yield from _compared(winner, candidates, objective)
    origin = next((one.trial for one in tried if one.trial.number == winner.number), None)
    if origin is not None and origin.continues is not None:
        yield (
            f"It copied the weights of trial {origin.continues:04d} at step {origin.from_step} and took new settings. "
            "best.yaml has only its last settings, which were not used from step 0."
        )
    for candidate in candidates:
        if candidate.standing == "collapsed":
            others = listed([f"{number:04d}" for number in candidate.collapsed])
            yield (
                f"Trial {candidate.name} ({score_text(objective, candidate.mean)}) is excluded: it collapsed with "
                f"another seed ({others})."
            )


def _nothing_won(ended: Sequence[TrialRecord], candidates: Sequence[Candidate]) -> Iterator[str]:
    collapsed = [one for one in ended if one.status == "collapsed"]
    failed = [one for one in ended if one.status == "failed"]
    everything = "the only ended trial" if len(ended) == 1 else f"all {len(ended)} ended trials"
    if candidates:
        yield "There is no best trial: every finished trial collapsed with another seed."
    elif collapsed and len(collapsed) == len(ended):
        yield f"There is no best trial: {everything} collapsed."
    elif failed and len(failed) == len(ended):
        yield f"Nothing was measured: {everything} failed."
    elif ended:
        yield "There is no best trial: no trial finished with a finite score."
    for verdict in dict.fromkeys(one.outcome.verdict for one in collapsed if one.outcome):
        if verdict in {v.value for v in Verdict} and Verdict(verdict).remedy:
            yield f"{verdict.capitalize()}: {Verdict(verdict).remedy}."


def _compared(winner: Candidate, candidates: Sequence[Candidate], objective: str) -> Iterator[str]:
    ties = [c for c in candidates if c.standing == "tie"]
    behind = [c for c in candidates if c.standing == "behind"]
    if ties:
        tied, noise = ("are", "differences are") if len(ties) > 1 else ("is", "difference is")
        yield (
            f"{named([c.name for c in ties])} {tied} tied with the best: the {noise} within seed noise (90 % interval "
            "of the difference, standard deviation pooled over all rerun trials)."
        )
    if behind:
        yield f"The best trial beats {listed([c.name for c in behind])} by more than seed noise."
    if not ties and not behind:
        yield "No other trial was run with several seeds, so the best trial has no comparison beyond one seed."
    higher = [c.name for c in candidates if c.standing == "not confirmed" and c.mean > winner.mean]
    if higher:
        yield f"{named(higher)} scored higher with one seed, not confirmed by other seeds."


def regions(tried: Sequence[TrialRecord], space: Mapping[str, Domain]) -> Iterator[str]:
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
            f"{named(rest)} also collapsed."
            if told
            else f"{named(rest)} collapsed; the settings show no clear boundary."
        )
    if others and not collapsed:
        yield "No trial collapsed."
    good = good_trials(tried)
    found = ranges(good, space)
    if found:
        inside = "; ".join(f"{key} {value}" for key, value in found.items())
        yield f"The better half of the finished trials ({len(good)}) has these settings: {inside}."


def agreements(found: Sequence[Agreement], objective: str) -> Iterator[str]:
    """Yield the agreement of metrics, limited to metrics with a tau over more than two trials."""
    told = [a for a in found if a.tau is not None and a.num_trials > 2]
    if not told:
        return
    num = min(a.num_trials for a in told)
    taus = ", ".join(f"{metric_name(a.metric)} {a.tau:+.2f}" for a in told)
    yield (
        f"Agreement with {metric_name(told[0].against)} over {num} trials (Kendall's tau): {taus}. 1 means the same "
        f"order, -1 the opposite order; a value within ±{chance_tau(num):.2f} may be chance."
    )


def influence(importance: Mapping[str, float] | None, scored: int) -> Iterator[str]:
    """Yield the influence of each setting, from `scored` trials with a score."""
    if not importance:
        return
    chance = chance_share(scored)
    told = [f"{key} {share:.0%}" for key, share in importance.items() if share > chance]
    little = [key for key, share in importance.items() if share <= chance]
    if not told:
        yield f"No single setting explains more of the variance in trial rank than chance does in {scored} trials."
        return
    rest = f" No more than chance: {listed(little)}." if little else ""
    yield f"Share of the variance in trial rank that one setting explains alone: {listed(told)}.{rest}"


def caveats(objective: str, space: Mapping[str, Domain]) -> Iterator[str]:
    """Yield the limitations of the objective."""
    if objective in ("rankme", "lidar"):
        yield (
            f"{metric_name(objective)} was the objective, which uses no labels. A high feature rank is necessary for "
            "good features, not sufficient. Check the best trials by k-NN on a few labelled images."
        )
    moved = [key for key in space if key.startswith(_PART_OF_THE_LOSS)]
    if objective == "loss" and moved:
        yield (
            f"The loss was the objective, and {listed(moved)} change its value directly: the ranking may be "
            "meaningless."
        )


def open_questions(
    tried: Sequence[TrialRecord],
    best: Candidate | None,
    space: Mapping[str, Domain],
    *,
    least: int,
    scored: int,
) -> Iterator[str]:
    """Yield the questions that the study leaves open."""
    unfinished = sum(one.status == "unfinished" for one in tried)
    if unfinished:
        yield f"Unfinished: {count(unfinished, 'trial')}; these findings may change."
    if 0 < scored < least:
        yield f"Importance of settings: needs {least} trials with a score; there are {scored} so far."
    for key, domain in space.items() if best else ():
        value = best.params.get(key) if best else None
        place = place_in(domain, value)
        if domain.kind == "choice" or place is None:
            continue
        low, high = domain.values
        at_end = value <= low or value >= high or (domain.is_continuous and min(place, 1 - place) <= _EDGE)
        if at_end:
            where = "at the edge of" if low <= value <= high else "outside"
            remedy = "widen the range there" if where == "at the edge of" else "include this value"
            span = f"{short(low)} to {short(high)}"
            yield f"The best trial has {key}={short(value)}, {where} the search range {span}; {remedy}."
    failed = [one for one in searched(tried) if one.status == "failed"] or [
        o for o in tried if o.status == "failed"
    ]
    if failed:
        message = " ".join((failed[0].outcome.message if failed[0].outcome else "").split())
        message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
        yield f"First error (trial {failed[0].trial.name}): {message or 'not recorded'}"


def savings(share: float, by_collapse: float, by_stopping: float) -> Iterator[str]:
    """Yield the savings from ending trials early; `by_...` in CPU-hours."""
    if share >= 0.005:
        yield (
            f"Ending trials early saved {share:.0%} of the steps: {by_collapse:.3g} CPU-hours of collapsed trials, "
            f"{by_stopping:.3g} CPU-hours of early-stopped trials."
        )
