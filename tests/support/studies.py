"""Studies that nobody ran: trials in memory, and whole study directories as a study would leave them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.space import CENTER_MOMENTUM, TEACHER_TEMP, Domain, at
from dinoray.pipeline.study.trials import (
    Outcome,
    Trial,
    TrialRecord,
    trial_directory,
    write_outcome,
    write_study,
    write_trial,
)
from dinoray.pipeline.tracking.records import Records

STEPS = 100
SPACE = {
    TEACHER_TEMP: Domain(kind="uniform", values=(0.02, 0.08)),
    CENTER_MOMENTUM: Domain(kind="one_minus_log", values=(0.5, 0.99)),
    "optim.name": Domain(kind="choice", values=("adamw", "sgd")),
}


def about(space: dict[str, Domain] | None = None, **changes: Any) -> dict[str, Any]:
    """study.json."""
    domains = {key: {"kind": d.kind, "values": list(d.values)} for key, d in (space or SPACE).items()}
    return {
        "name": "sweep",
        "space": domains,
        "objective": "knn_20",
        "reason": "there are labels",
        "total_steps": STEPS,
        "grace_steps": 20,
        "evaluations": 5,
        "num_images": 1000,
        "out_dim": 1024,
        "searcher": "tpe",
        "scheduler": "asha",
        "seed": 0,
        "confirm_top": 2,
        "confirm_seeds": 3,
        "trials": 24,
        "plan": {"trials_at_once": 2, "cpus_each": 4, "gpus_each": 1, "cpus_for_data": 2},
        "seconds": 5400.0,
        **changes,
    }


def tried(number: int, score: float | None = 0.5, status: str = "finished", **changes: Any) -> TrialRecord:
    """One trial without metrics; `changes` are fields of Trial and of Outcome."""
    names = ("params", "seed", "origin", "confirms", "continues", "from_step")
    fields = {name: changes.pop(name) for name in names if name in changes}
    trial = Trial(**{"number": number, "params": {}, "seed": 0, "origin": "quasi", **fields})
    if status == "unfinished":
        return TrialRecord(trial, None, Records(b""))
    verdict = "uniform collapse" if status == "collapsed" else "healthy"
    values = {"step": STEPS, "verdict": verdict, "seconds": 100.0, "cpu_hours": 1.0, **changes}
    return TrialRecord(trial, Outcome(status=status, score=score, **values), Records(b""))  # type: ignore[arg-type]


def write_tried(study: Directory, one: TrialRecord, metrics: bytes = b"") -> None:
    """As files."""
    write_trial(study, one.trial)
    if metrics:
        trial_directory(study, one.trial).write("metrics.jsonl", metrics)
    if one.outcome:
        write_outcome(study, one.trial, one.outcome)


def write_whole_study(folder: Path, *, labels: bool = True, num: int = 24, **changes: Any) -> Directory:
    """Collapse where the teacher is warm and the centre slow, an optimum inside, and the two best confirmed."""
    study = Directory(str(folder))
    rng = np.random.default_rng(3)
    scores: dict[int, float] = {}
    params: dict[int, dict[str, Any]] = {}
    for number in range(num):
        params[number] = at(SPACE, {key: float(rng.random()) for key in SPACE})
        scores[number] = _write_run(study, Trial(number, params[number], 0, "tpe"), rng, labels=labels)
    best = sorted(scores, key=lambda number: -scores[number])[:3]
    for i, root in enumerate([r for r in best for _ in range(2)]):
        trial = Trial(num + i, params[root], 1 + i % 2, "confirm", confirms=root)
        _write_run(study, trial, rng, labels=labels)
    write_tried(study, tried(num + 6, None, "failed", step=0, message="bucket is gone: <b>s3://x</b>"))
    write_tried(study, tried(num + 7, status="unfinished", params=params[0]))
    write_study(study, about(**({"objective": "knn_20" if labels else "rankme"} | changes)))
    return study


def _write_run(study: Directory, trial: Trial, rng: np.random.Generator, *, labels: bool) -> float:
    """Write a run of these parameters; its score, 0 where it collapsed or was given up."""
    temp, momentum = trial.params[TEACHER_TEMP], trial.params[CENTER_MOMENTUM]
    depth = math.log((1 - momentum) / 0.5) / math.log(0.01 / 0.5)  # 0 to 1 over the space
    quality = 0.62 - 90 * (temp - 0.045) ** 2 - 0.08 * (depth - 0.5) ** 2 + rng.normal(0, 0.006)
    quality -= 0.05 * (trial.params["optim.name"] == "sgd")
    collapses = temp > 0.055 and depth > 0.4
    stops = not collapses and quality < 0.55 and trial.confirms is None
    end = 45 if collapses else 40 if stops else STEPS
    lines: list[dict[str, Any]] = []
    for step in range(0, end + 1, 5):
        done = 1 - math.exp(-step / 35)
        ratio = 1 - (0.0 if collapses and step > 20 else 0.55 * done) + rng.normal(0, 0.004)
        lines.append(
            {"step": step, "loss": 6.9 - 2 * done - 20 * (0.08 - temp), "entropy_ratio": min(1.0, ratio)}
        )
        if step % 20 == 0:
            level = 0.1 if collapses and step > 20 else 0.1 + (quality - 0.1) * done
            scores = {"rankme": 5 + 100 * level + rng.normal(0, 2), "lidar": 20 * level + rng.normal(0, 1)}
            knn = {"knn_10": level - 0.01, "knn_20": level + rng.normal(0, 0.002), "majority": 0.1}
            lines.append({"step": step, **scores, **(knn if labels else {})})
    last = {k: v for line in lines for k, v in line.items() if k not in ("step", "majority", "entropy_ratio")}
    status = "collapsed" if collapses else "stopped" if stops else "finished"
    score = last["knn_20" if labels else "rankme"]
    outcome = Outcome(
        status=status,
        score=0.0 if collapses else score,
        step=end,
        verdict="uniform collapse" if collapses else "healthy",
        message="",
        scores=last,
        seconds=20.0 + 3 * end,
        start_seconds=20.0,
        cpu_hours=(20.0 + 3 * end) / 900,
        gpu_hours=(20.0 + 3 * end) / 3600,
    )
    metrics = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write_tried(study, TrialRecord(trial, outcome, Records(b"")), metrics)
    return score if status == "finished" else 0.0
