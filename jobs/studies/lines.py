"""What a person reads of a study while it goes on: what it will do, and a line for each trial that ends."""

from collections.abc import Mapping
from typing import Any

from dinoray.jobs.studies.config import StudyConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.objective import Objective
from dinoray.pipeline.study.space import Space
from dinoray.pipeline.study.trials import TrialRecord
from dinoray.pipeline.training.auto import resolve

_TOLD = ("evaluations", "searcher", "scheduler", "reduction_factor", "seed", "confirm_top", "confirm_seeds")
"""Of `tune`, what study.json has."""


def about_study(
    config: StudyConfig,
    space: Space,
    objective: Objective,
    *,
    total_steps: int,
    grace_steps: int,
    num_images: int,
    num_trials: int,
) -> dict[str, Any]:
    """study.json, but for the plan and the time it took."""
    return {
        "name": config.name,
        "space": {key: {"kind": d.kind, "values": list(d.values)} for key, d in space.items()},
        "objective": objective.metric,
        "reason": objective.reason,
        "total_steps": total_steps,
        "grace_steps": grace_steps,
        "num_images": num_images,
        "out_dim": resolve(config.algorithm(), num_images=num_images).config.head.out_dim,
        "trials": num_trials,
        **{key: value for key, value in config.tune.model_dump().items() if key in _TOLD},
    }


def describe_search(directory: Directory, study: Mapping[str, Any]) -> str:
    """What is searched, by which objective, and when trials end early, from study.json."""
    total, grace = study["total_steps"], study["grace_steps"]
    searched = ", ".join(f"{key} {d['kind']} {d['values']}" for key, d in study["space"].items())
    stops = "no trial is stopped early"
    if study["scheduler"] == "asha" and grace < total:
        stops = f"ASHA stops trials early, from step {grace} on: 1 in {study['reduction_factor']:g} continues"
    elif study["scheduler"] == "asha":
        stops += f": warm-ups and tune.grace last {grace} of {total} steps"
    elif study["scheduler"] == "pb2":
        stops = (
            f"PB2: {study['trials']} members; from the second evaluation on, the worst quarter copies "
            "the weights of the best"
        )
    confirmed = f", then the best {study['confirm_top']} with {study['confirm_seeds']} seeds"
    if not study["confirm_top"] or study["scheduler"] == "pb2":  # a course of settings, which no seed repeats
        confirmed = ""
    return (
        f"study {directory.uri}: {study['trials']} trials of {total} steps by {study['searcher']}"
        f"{confirmed}\n"
        f"space: {searched}\n"
        f"objective: {study['objective']}: {study['reason']}\n"
        f"{stops}; a collapse ends a trial"
    )


def trial_line(tried: TrialRecord, study: Mapping[str, Any]) -> str:
    """How a trial ended, with its score and parameters."""
    trial, outcome = tried.trial, tried.outcome
    if outcome is None:
        return f"trial {trial.name}  ended without an outcome"
    what = {
        "collapsed": f"collapsed ({outcome.verdict})",
        "failed": f"failed: {outcome.message}",
        "stopped": outcome.message or "stopped early",
    }.get(outcome.status, outcome.status)
    value = outcome.scores.get(study["objective"])
    parts = [f"trial {trial.name}", f"{what} at step {outcome.step}/{study['total_steps']}"]
    parts += [f"{study['objective']} {value:.4g}"] if value is not None else []
    parts += [f"{key}={value}" for key, value in trial.params.items()]
    parts += [f"confirms {trial.confirms:04d} with seed {trial.seed}"] if trial.confirms is not None else []
    return "  ".join([*parts, f"{outcome.seconds:.0f} s"])
