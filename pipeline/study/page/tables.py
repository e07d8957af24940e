"""Tables of a study: candidates, agreement of metrics, trials by what became of them; for the page, a file, a terminal.

Knows nothing of files or pages.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from dinoray.pipeline.study.findings.ranking import Candidate, number_of, score_of
from dinoray.pipeline.study.findings.regions import short
from dinoray.pipeline.study.findings.sentences import gain_text, metric_name, result_text, score_text
from dinoray.pipeline.study.findings.summary import Findings
from dinoray.pipeline.study.trials import Trial, TrialRecord
from dinoray.pipeline.tracking.rankings import chance_tau
from dinoray.pipeline.tracking.start import LABEL_FREE_NAMES

_MARKS = {"best": "best", "tie": "tied with the best", "collapsed": "collapsed with another seed"}
_MAX_CELL = 34


def candidate_row(candidate: Candidate, found: Findings) -> dict[str, str]:
    """Mean and spread over its seeds, how it stands, its settings."""
    score = score_text(found.objective, candidate.mean)
    if candidate.std is not None:
        score = result_text(found.objective, candidate).partition(" over ")[0]
    return {
        "trial": candidate.name,
        metric_name(found.objective): score,
        **gain_cells(candidate, found),
        "seeds": ", ".join(map(str, candidate.seeds)),
        "standing": _MARKS.get(candidate.standing, candidate.standing),
        **{key: short(candidate.params[key]) for key in found.space if key in candidate.params},
    }


def gain_cells(candidate: Candidate, found: Findings) -> dict[str, str]:
    """By how much its seeds are above the weights they started from; nothing in a study without such a start."""
    if not found.gains:
        return {}
    return {"above the start": gain_text([found.gains[n] for n in candidate.trials if n in found.gains])}


def agreement_rows(found: Findings) -> Iterator[dict[str, str]]:
    """Kendall's tau of two metrics, over which trials, and what of it may be chance."""
    for a in found.kendall:
        which = "finished"
        if a.with_collapsed:
            which += " and collapsed, " + ("ranked last by both metrics" if a.gated else "metric as measured")
        yield {
            "metric": metric_name(a.metric),
            "reference": metric_name(a.against),
            "trials": f"{a.num_trials}: {which}",
            "tau": "-" if a.tau is None else f"{a.tau:+.2f}",
            "chance range": f"±{chance_tau(a.num_trials):.2f}",
        }


def _params(one: TrialRecord, found: Findings) -> dict[str, str]:
    return {key: short(one.trial.params[key]) for key in found.space if key in one.trial.params}


def collapsed_rows(tried: Sequence[TrialRecord], found: Findings) -> Iterator[dict[str, Any]]:
    """What collapsed, how, when and with which settings."""
    for one in tried:
        if one.outcome and one.status == "collapsed":
            about = {"trial": one.trial.name, "verdict": one.outcome.verdict, "step": one.outcome.step}
            yield about | _params(one, found)


def error_rows(tried: Sequence[TrialRecord]) -> Iterator[dict[str, Any]]:
    """What could not be run, and why."""
    for one in tried:
        if one.outcome and one.status == "failed":
            yield {"trial": one.trial.name, "step": one.outcome.step, "error": one.outcome.message}


def trial_row(one: TrialRecord, found: Findings) -> dict[str, Any]:
    """Any trial in short."""
    outcome, score = one.outcome, score_of(one)
    row: dict[str, Any] = {
        "trial": one.trial.name,
        "status": one.status,
        "origin": f"rerun of {one.trial.confirms:04d}"
        if one.trial.confirms is not None
        else one.trial.origin,
        "seed": one.trial.seed,
        metric_name(found.objective): "" if score is None else score_text(found.objective, score),
        "step": outcome.step if outcome else one.records.last_step or 0,
    }
    row |= _params(one, found)
    for metric in LABEL_FREE_NAMES:
        value = number_of(outcome.scores.get(metric)) if outcome else None
        if value is not None and metric != found.objective:
            row[metric_name(metric)] = f"{value:.4g}"
    return row


def csv_table(tried: Sequence[TrialRecord]) -> str:
    """A row a trial; numbers as they are recorded."""
    params = list(dict.fromkeys(key for one in tried for key in one.trial.params))
    metrics = sorted({name for one in tried if one.outcome for name in one.outcome.scores})
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    head = ("number", "status", "verdict", "origin", "seed", "confirms")
    about = [field.name for field in fields(Trial) if field.name not in (*head, "params")]
    tail = ("seconds", "start_seconds", "cpu_hours", "gpu_hours", "message")
    rows.writerow([*head, *about, *params, "score", "step", *metrics, *tail])
    for one in tried:
        trial, outcome = one.trial, one.outcome
        rows.writerow(
            [
                *(
                    trial.number,
                    one.status,
                    outcome.verdict if outcome else "",
                    trial.origin,
                    trial.seed,
                    trial.confirms,
                ),
                *(getattr(trial, name) for name in about),
                *(trial.params.get(key) for key in params),
                *((outcome.score, outcome.step) if outcome else (None, one.records.last_step)),
                *(outcome.scores.get(name) if outcome else None for name in metrics),
                *(getattr(outcome, name, None) for name in tail),
            ]
        )
    return file.getvalue()


def aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows under their names, in columns as wide as they must be."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    cells = [[" ".join(cell.split())[:_MAX_CELL] for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
