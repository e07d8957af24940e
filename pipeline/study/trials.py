"""The stored state of a study: its trials, each a run directory with its parameters and outcome.

A study directory (local or S3):

    config.yaml               the resolved config, with the section `tune`
    environment.json          versions, hardware, git commit
    manifest.parquet          the images, listed once for all trials
    study.json                space, objective and steps of the study
    trials/
      0000/                   a run directory (training/checkpoint.py), and in it
        trial.json            parameters and seed; written before the trial starts
        outcome.json          written when it has ended: the trial is never run again
    study.html  study.csv  study.png    findings
    best.yaml                 the best config, as jobs.pretrain --config takes it

These files are the only progress: a killed study resumes from them, and no state in memory is needed. No Ray
here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from dinoray.models.errors import DataError, one_line
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import Records, read, read_records

STUDY = "study.json"
TRIAL = "trial.json"
OUTCOME = "outcome.json"
BEST = "best.yaml"
TRIALS = "trials"
"""The folder of a study that holds the run directories of its trials."""

Record = TypeVar("Record", "Trial", "Outcome")

Status = Literal["finished", "stopped", "collapsed", "failed"]
"""Trained to the end; early-stopped, or replaced by a member with better weights; collapsed; failed."""


@dataclass(frozen=True)
class Trial:
    """One set of parameters to train with: values by dotted key of the run's config."""

    number: int
    params: dict[str, Any]
    seed: int
    origin: str
    """Source of the parameters: `recipe`, `first`, `random`, `quasi`, `grid`, `tpe`, `pb2`, or `confirm`."""
    confirms: int | None = None
    """Trial whose parameters this trial repeats with another seed."""
    continues: int | None = None
    """Trial from whose weights this trial starts, with other parameters."""
    from_step: int = 0
    """Step of the checkpoint of that trial from which this trial starts."""

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.number:04d}"


@dataclass(frozen=True)
class Outcome:
    """Outcome of a trial."""

    status: Status
    score: float | None
    """Objective at the last evaluation, larger is better; the worst possible if collapsed; None if failed."""
    step: int
    """Number of trained steps."""
    verdict: str = "healthy"
    """Health verdict, see training/health.py."""
    message: str = ""
    """Error message of a failed trial."""
    scores: dict[str, float] = field(default_factory=dict)
    """All metrics of the last evaluation, and `loss`."""
    seconds: float = 0.0
    """Wall-clock time over all attempts."""
    start_seconds: float = 0.0
    """Part of `seconds` before the first step was trained."""
    cpu_hours: float = 0.0
    """CPU-hours: reserved CPUs times hours of reservation."""
    gpu_hours: float = 0.0
    """GPU-hours: reserved GPUs times hours of reservation."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial, its outcome if it has ended, and its logged metrics."""

    trial: Trial
    outcome: Outcome | None
    records: Records

    @property
    def status(self) -> str:
        """Return the status of the outcome, or `unfinished`."""
        return self.outcome.status if self.outcome else "unfinished"


def trial_directory(study: Directory, trial: Trial) -> Directory:
    """Return the run directory of the trial."""
    return study.child(TRIALS).child(trial.name)


def write_trial(study: Directory, trial: Trial) -> None:
    """Store the trial before it is run."""
    trial_directory(study, trial).write(TRIAL, json.dumps(asdict(trial), indent=1).encode())


def write_outcome(study: Directory, trial: Trial, outcome: Outcome) -> None:
    """Store the outcome of a trial."""
    trial_directory(study, trial).write(OUTCOME, json.dumps(asdict(outcome), indent=1).encode())


def read_trials(study: Directory, *, ended: Mapping[int, TrialRecord] | None = None) -> list[TrialRecord]:
    """Return all trials of the study, by number; trials in `ended` are not read again."""
    found = []
    for name in study.child(TRIALS).list():
        if ended and name.isdecimal() and int(name) in ended:
            found.append(ended[int(name)])
            continue
        run = study.child(TRIALS).child(name)
        trial = _read(Trial, run, TRIAL)
        if trial is not None:  # None: the folder exists, but its trial was never stored or started
            found.append(TrialRecord(trial, _read(Outcome, run, OUTCOME), read_records(run)))
    return sorted(found, key=lambda tried: tried.trial.number)


def _read(kind: type[Record], run: Directory, name: str) -> Record | None:
    """Read a record; raise DataError for other content: the trial must not be run twice because of it."""
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
    """Return metrics and loss by step of evaluation, in order; omit values that are not finite."""
    found: dict[int, dict[str, float]] = {}
    for name in records.names(r"knn_\d+|majority|num_val|rankme|lidar|cluster_learnability|intrinsic_dim"):
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
    """Write study.json."""
    study.write(STUDY, json.dumps(about, indent=1).encode())


def read_study(study: Directory) -> dict[str, Any]:
    """Return the content of study.json; empty if there is none."""
    return json.loads(read(study, STUDY) or b"{}")
