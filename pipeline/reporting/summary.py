"""The head of a report: what was found, how far the run is, when, and which commands come next. No Ray here.

Of the run's files alone, so that the same files give the same words.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from dinoray.models.commands import command
from dinoray.models.counts import count
from dinoray.models.errors import DataError
from dinoray.pipeline.reporting.page import Html, commands, escape, section
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, is_s3
from dinoray.pipeline.storage.run_dir import committed_checkpoints
from dinoray.pipeline.tracking.records import Records, attention_figures, read_mapping
from dinoray.pipeline.tracking.scores import best_checkpoint, decline, missing_evaluations, scores_of
from dinoray.pipeline.tracking.start import against_start
from dinoray.pipeline.training.verdict import Verdict

_NEWEST = 20
"""Lines by which speed is told."""


class Course(NamedTuple):
    """How far a run is: what its lines and settings say of steps and of time."""

    step: int | None
    epoch: float
    epochs: float
    is_finished: bool
    """Whether result.json is there."""
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    """When the run ended, or the newest line was written."""
    seconds_per_step: float
    ending: str
    """The error that ended the run; empty where there was none."""

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None where lines or settings do not say."""
        if not self.step or not self.epoch > 0 or math.isnan(self.epochs):
            return None
        return max(self.step, math.floor(self.epochs * self.step / self.epoch + 1e-6))

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.is_finished or (self.step is not None and self.total_steps == self.step)

    @property
    def seconds_left(self) -> float:
        """For the other steps at the speed of the newest ones; NaN where that is not known."""
        total = self.total_steps
        if total is None or self.step is None:
            return math.nan
        return (total - self.step) * self.seconds_per_step


def course(run: Directory, records: Records, values: Mapping[str, Any], *, ending: str = "") -> Course:
    """How far the run is."""
    times = records.series("time", over="time").steps
    result, about = read_mapping(run, run_dir.RESULT), read_mapping(run, run_dir.ENVIRONMENT)
    epochs = values.get("train.epochs")
    return Course(
        step=records.last_step,
        epoch=records.series("epoch").last,
        epochs=float(epochs) if isinstance(epochs, int | float) else math.nan,
        is_finished=bool(result),
        started=_time(about.get("started"), times[:1]),
        ended=_time(result.get("ended"), times[-1:]),
        seconds_per_step=_seconds_per_step(records),
        ending=ending,
    )


def header(name: str, run: Directory, found: Course, records: Records) -> Html:
    """Name, address, the finding, the state, the best checkpoint, a decline since, and when."""
    lines = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="address">{escape(run.uri)}</p>',
        f'<p class="finding">{escape(finding(found, records))}</p>',
        f'<p class="state">{escape(_state(found))}</p>',
    ]
    with contextlib.suppress(
        DataError
    ):  # none of them can be used; the page is of the run's course all the same
        if best := best_checkpoint(run, records):
            lines.append(f'<p class="state">Best checkpoint: {escape(str(best))}.</p>')
        if words := against_start(records.lines, best):
            lines.append(f'<p class="state">{escape(words[0].upper() + words[1:])}.</p>')
    if fall := decline(scores_of(records.lines)):
        words = str(fall)
        lines.append(f'<p class="state">{escape(words[0].upper() + words[1:])}.</p>')
    for step, why in missing_evaluations(records.lines).items():
        lines.append(f'<p class="state">{escape(f"There is no evaluation of step {step}: {why}.")}</p>')
    if when := _when(found):
        lines.append(f'<p class="state">{escape(when)}</p>')
    return Html("\n".join(lines))


def finding(found: Course, records: Records) -> str:
    """What was learnt, or why nothing was, in a sentence or two."""
    if found.step is None:
        return (
            f"The run ended before its first step: {found.ending}"
            if found.ending
            else "The run has no metrics yet."
        )
    changes = records.verdicts()
    verdict, since = (changes[-1][1], changes[-1][0]) if changes else (Verdict.HEALTHY.value, 0)
    if verdict == Verdict.NON_FINITE.value:
        words = f"The run fails: loss or gradients have not been finite since step {since}."
    elif verdict in (Verdict.UNIFORM.value, Verdict.SINGLE.value):
        words = f"The run collapsed: {verdict} since step {since}. Its features are of little use."
    elif verdict == Verdict.WORSE.value:
        words = f"The run is worse than its start since step {since}."
    elif found.ending:
        words = f"The run ended early, after {count(found.step, 'step')}."
    elif found.is_done:
        words = ""
    else:
        words = "The run is not finished."
    return " ".join(filter(None, [words, _learnt(records)]))


def _learnt(records: Records) -> str:
    """k-NN then and now, else the loss."""
    for name in records.names(r"knn_\d+")[-1:]:
        series = records.series(name)
        known = np.isfinite(series.values)
        steps, scores = series.steps[known], series.values[known]
        if not len(scores):
            continue
        k, majority = name.removeprefix("knn_"), records.series("majority").last
        guess = "" if math.isnan(majority) else f" Always guessing the commonest class gives {majority:.1%}."
        then, now = (f"{scores[i]:.1%} {_when_measured(steps[i])}" for i in (0, -1))
        if len(scores) == 1:
            return f"k-NN accuracy (k={k}) is {now}.{guess}"
        return f"k-NN accuracy (k={k}) {_went(scores[0], scores[-1])} from {then} to {now}.{guess}"
    loss = records.series("loss").values
    loss = loss[np.isfinite(loss)]
    if not len(loss):
        return ""
    course = f"{_went(loss[0], loss[-1])} from {loss[0]:.3f} to {loss[-1]:.3f}"
    return (
        f"The loss {course if len(loss) > 1 else f'is {loss[0]:.3f}'}. "
        "There are no labels: evaluate on labelled images to measure feature quality."
    )


def _when_measured(step: float) -> str:
    return f"after {count(step, 'step')}" if step else "before training"


def _went(first: float, last: float) -> str:
    return "rose" if last > first else "fell" if last < first else "was unchanged,"


def _state(found: Course) -> str:
    if found.step is None:
        return "No metrics yet."
    if found.is_finished:
        return f"Finished after {count(found.step, 'step')}."
    if found.is_done:
        return f"All {count(found.step, 'step')} are done."
    total = "" if math.isnan(found.epochs) else f" of {found.epochs:g}"
    epoch = "." if math.isnan(found.epoch) else f", epoch {found.epoch:.1f}{total}."
    state = f"Not finished: step {found.step}{epoch}"
    if found.ending:
        return f"{state} Ended by: {found.ending}"
    if math.isnan(found.seconds_left):
        return state
    left = count((found.total_steps or 0) - found.step, "step")
    end = "" if found.ended is None else f"; expected end {_date(found.ended + found.seconds_left)}"
    return f"{state} Remaining: {left}, about {duration(found.seconds_left)} at the latest speed{end}."


def _when(found: Course) -> str:
    if found.started is None or found.ended is None:
        return ""
    word = "ended" if found.is_done or found.ending else "latest metrics"
    lasted = duration(found.ended - found.started)
    return f"Started {_date(found.started)}, {word} {_date(found.ended)}, duration {lasted}."


def next_commands(run: Directory, found: Course, records: Records, values: Mapping[str, Any]) -> Html:
    """What a person does with the run now, as lines to copy."""
    known = records.last_step is not None
    return section("Next commands", commands(dict(_commands(run, found, values))) if known else Html(""))


def _commands(run: Directory, found: Course, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    place = run.uri
    # Of a mix the first source: commands take one.
    images = next((key.removeprefix("data.mix.") for key in values if key.startswith("data.mix.")), None)
    images = images or values.get("data.path")
    where = [images] if isinstance(images, str) and images else []
    if not found.is_done:
        yield "resume", _resume(run, values)
    try:
        if not committed_checkpoints(run):
            return
    except DataError:  # none of them can be used; the page is of the run's course all the same
        return
    yield "evaluate", command("evaluate", place)
    if attention_figures(run):
        yield "animate the attention maps", command("attention", place, *where, "--animate")
    yield "export the backbone", command("export", place, "--format", "timm")
    if where:
        yield "embed images", command("embed", place, *where, "--out", run.join("embeddings"))


def _resume(run: Directory, values: Mapping[str, Any]) -> str:
    """The line that continues the run: from its config.yaml, or, where that is on S3, from recipe and settings."""
    if not is_s3(run.uri):
        return command("pretrain", "--config", run.join("config.yaml"))
    recipe = read_mapping(run, run_dir.ENVIRONMENT).get("recipe")
    changed = recipe.get("changed") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(changed, dict):
        return "repeat the command that started the run"
    settings = {"name": values.get("name")}
    for key, two in changed.items():
        # A default of another backbone, which the change of its name takes away.
        if isinstance(two, dict) and not (key.startswith("backbone.kwargs.") and two.get("run") is None):
            settings[key] = two.get("run")
    overrides = (f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items())
    return command("pretrain", "--recipe", str(recipe.get("name")), *overrides)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _time(noted: Any, otherwise: Any) -> float | None:
    """Seconds since 1970, where they are noted and a date; else the given line's, if there is one."""
    for value in (noted, *otherwise):
        if isinstance(value, int | float) and 0 < value < 1e11:
            return float(value)
    return None


def _seconds_per_step(records: Records) -> float:
    """The median of the newest lines: a pause, such as an evaluation, does not count."""
    steps, times = records.series("time")
    apart = np.diff(steps[-_NEWEST:])
    known = apart > 0
    rates = np.diff(times[-_NEWEST:])[known] / apart[known]
    rates = rates[np.isfinite(rates) & (rates > 0)]
    return float(np.median(rates)) if len(rates) else math.nan
