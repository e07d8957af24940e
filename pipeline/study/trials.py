"""What a study remembers: its trials, each a run directory with its parameters and what became of it.

A study directory (local or S3):

    config.yaml               the resolved config, with the section `tune`
    environment.json          versions, hardware, git commit
    manifest.parquet          the images, listed once for all trials
    study.json                what is searched, by which objective, over how many steps
    trials/
      0000/                   a run directory (training/checkpoint.py), and in it
        trial.json            parameters and seed; written before the trial starts
        outcome.json          written when it has ended: the trial is never run again
    study.html  study.csv  study.png    what was found
    best.yaml                 the best config, as jobs.pretrain --config takes it

Progress is these files and nothing else: a study that is killed is continued from them, whatever had been in
anybody's memory. No Ray here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from models.errors import DataError, one_line
from pipeline.storage.files import Directory
from pipeline.tracking.records import Records, read, read_records

STUDY = "study.json"
TRIAL = "trial.json"
OUTCOME = "outcome.json"
BEST = "best.yaml"

Record = TypeVar("Record", "Trial", "Outcome")

Status = Literal["finished", "stopped", "collapsed", "failed"]
"""Trained to its end; given up for better ones, or replaced by one that went on from a better; collapsed; failed."""


@dataclass(frozen=True)
class Trial:
    """One set of parameters to be tried: values by dotted key of the run's config."""

    number: int
    params: dict[str, Any]
    seed: int
    origin: str
    """Who proposed it: `recipe`, `first`, `random`, `quasi`, `grid`, `tpe`, `pb2`, or `confirm`."""
    confirms: int | None = None
    """The trial whose parameters it repeats with another seed."""
    continues: int | None = None
    """The trial from whose weights it goes on, with other parameters."""
    from_step: int = 0
    """The checkpoint of that trial which it goes on from."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.number:04d}"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    status: Status
    score: float | None
    """The objective, larger is better, at its last evaluation; the worst there is after a collapse; None: failed."""
    step: int
    """Steps that it was trained for."""
    verdict: str = "healthy"
    """Of its health, training/health.py."""
    message: str = ""
    """What went wrong, in words."""
    scores: dict[str, float] = field(default_factory=dict)
    """All metrics of its last evaluation, and `loss`."""
    seconds: float = 0.0
    """Wall time over all attempts."""
    start_seconds: float = 0.0
    """Of these, until the first step was trained."""
    cpu_hours: float = 0.0
    """CPUs it had reserved times the hours it had them."""
    gpu_hours: float = 0.0
    """GPUs likewise."""


@dataclass(frozen=True)
class Tried:
    """A trial, its outcome if it has ended, and the metrics it has logged."""

    trial: Trial
    outcome: Outcome | None
    records: Records

    @property
    def status(self) -> str:
        """Of the outcome, or `unfinished`."""
        return self.outcome.status if self.outcome else "unfinished"


def trial_directory(study: Directory, trial: Trial) -> Directory:
    """The trial's run directory."""
    return study.child("trials").child(trial.name)


def write_trial(study: Directory, trial: Trial) -> None:
    """Remember that the trial is to be run."""
    trial_directory(study, trial).write(TRIAL, json.dumps(asdict(trial), indent=1).encode())


def write_outcome(study: Directory, trial: Trial, outcome: Outcome) -> None:
    """Remember that it has ended."""
    trial_directory(study, trial).write(OUTCOME, json.dumps(asdict(outcome), indent=1).encode())


def read_trials(study: Directory, *, ended: Mapping[int, Tried] | None = None) -> list[Tried]:
    """All trials of the study, by number; those in `ended` are taken from there, unread."""
    found = []
    for name in study.child("trials").list():
        if ended and name.isdecimal() and int(name) in ended:
            found.append(ended[int(name)])
            continue
        run = study.child("trials").child(name)
        trial = _read(Trial, run, TRIAL)
        if trial is not None:  # else the folder was made and its trial lost before it was begun
            found.append(Tried(trial, _read(Outcome, run, OUTCOME), read_records(run)))
    return sorted(found, key=lambda tried: tried.trial.number)


def _read(kind: type[Record], run: Directory, name: str) -> Record | None:
    """DataError for a file that holds something else: a trial must not be run twice because of it."""
    data = read(run, name)
    if data is None:
        return None
    try:
        return kind(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{run.join(name)} is damaged: {one_line(error)}; mend or remove the trial"
        ) from error


def evaluations(records: Records) -> dict[int, dict[str, float]]:
    """Metrics by step at which a trial was evaluated, in order, and the loss there; what is not finite is left out."""
    found: dict[int, dict[str, float]] = {}
    for name in records.names(r"knn_\d+|majority|rankme|lidar"):
        series = records.series(name)
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            if math.isfinite(value):
                found.setdefault(int(step), {})[name] = value
    loss = records.series("loss")
    for step, value in zip(loss.steps.tolist(), loss.values.tolist(), strict=True):
        if int(step) in found and math.isfinite(value):
            found[int(step)]["loss"] = value
    return dict(sorted(found.items()))


def write_study(study: Directory, about: Mapping[str, Any]) -> None:
    """study.json."""
    study.write(STUDY, json.dumps(about, indent=1).encode())


def read_study(study: Directory) -> dict[str, Any]:
    """study.json; empty when there is none."""
    return json.loads(read(study, STUDY) or b"{}")
