"""A study as one config, and the runs that come of it: each trial's, and the one that starts from the best.

A trial is the run made short by `tune.epochs`. Warm-ups stay as long as they are, since it is the optimiser that needs
them, up to a share of the trial. Pure functions of the config and of a trial's parameters.
"""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from dinoray.jobs.cli.arguments import Arguments
from dinoray.jobs.cli.config import apply_tree, load, validate_as
from dinoray.jobs.cli.keys import did_you_mean, leaf_fields
from dinoray.jobs.studies.rules import scheduler_mistakes, warmup_mistakes
from dinoray.models.config import LossConfig
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.study.config import StudySettings
from dinoray.pipeline.study.objective import Objective, choose
from dinoray.pipeline.study.search.samplers import grid_size
from dinoray.pipeline.study.space import (
    CENTERING,
    TEACHER_TEMP,
    WARMUP_EPOCHS,
    WARMUP_TEMP,
    Domain,
    Space,
    default_space,
)
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.config import DINOConfig, Schedule
from dinoray.pipeline.worker.config import Config

MUTABLE_ON_RESUME = (
    "tune.trials",
    "tune.confirm_top",
    "tune.confirm_seeds",
    "tune.share_stream",
    "tune.share_stream_bytes",
    "tune.max_concurrent",
    "tune.cluster_cpus",
    "tune.cluster_gpus",
    "tune.max_failures",
)
"""What may differ when a study is continued: more trials, more seeds, another cluster."""

NAME_SUFFIX = "-study"
"""A study is named after its recipe with this at the end."""

_WARMUPS = ("optim.warmup_epochs", "optim.freeze_last_layer_epochs", WARMUP_EPOCHS)
_WARMUP_SHARE = 0.3
"""Of a trial that is shorter than the run, a warm-up takes no more than this, or than its share of the run."""

_NOT_SEARCHED = {
    "train.seed": "seeds are not searched; set tune.confirm_seeds to repeat the best trials",
    "train.epochs": "all trials have the same length; set tune.epochs",
}
_LOGGED_PER_EVALUATION = 6
"""Readings of a trial's health between two evaluations, at least: a collapse must be seen to last."""


class StudyConfig(Config):
    """All settings of a study: the run that its trials vary, and the search."""

    tune: StudySettings = StudySettings()


class StudyArguments(Arguments):
    """The command line of jobs.tune."""

    def __init__(self) -> None:
        super().__init__("tune", "Search hyper-parameters of a pretraining run with Ray Tune.", StudyConfig)
        self.add_argument("--verbose", action="store_true", help="show Ray's own logs")


def study_config(arguments: Namespace) -> StudyConfig:
    """The config that a parsed command line asks for; a run and a study of one recipe stand side by side."""
    return load(StudyConfig, arguments.recipe, arguments.config, arguments.overrides, name_suffix=NAME_SUFFIX)


def space_of(config: StudyConfig) -> dict[str, Any]:
    """What is searched, each end of each domain tried as a config. ConfigError holds one line per mistake."""
    space: Space = config.tune.space or default_space(config.algorithm())
    known = [key for key in leaf_fields(DINOConfig) if key not in _NOT_SEARCHED]
    plain = config.model_dump(mode="json")
    own = {key: _at(plain, key) for key in space if key in known}
    mistakes = []
    for key, domain in space.items():
        if key not in known:
            near = did_you_mean(key, known) or "; leave it out"
            why = _NOT_SEARCHED.get(key, f"it is not a setting of the algorithm{near}")
            mistakes.append(f"tune.space: {key}: {why}")
            continue
        if domain.is_continuous or domain.kind == "int":
            tried = [domain.at(0.0), domain.at(1.0)]
        else:
            tried = list(domain.values)
        for value in tried:
            try:
                candidate(config, {**own, key: value})
            except ConfigError as error:
                mistakes += [f"tune.space: {key}={value!r}: {line}" for line in str(error).splitlines()]
    mistakes += warmup_mistakes(space, config.loss)
    mistakes += scheduler_mistakes(space, config.tune, num_streams=config.data.streams)
    least, most = config.resources.worker_range
    if least < most:
        mistakes.append(
            f"resources.train_workers=[{least}, {most}] must be one number in a study, whose trials share the cluster; "
            f"set resources.train_workers={least}"
        )
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return {key: domain for key, domain in space.items() if not _is_one_in_short(config, key, domain)}


def _is_one_in_short(config: StudyConfig, key: str, domain: Domain) -> bool:
    """Whether a warm-up would be the same in all trials because they are short. ConfigError where it was asked for."""
    if key not in _WARMUPS:
        return False
    tried = {repr(_warmups(config, {key: domain.at(u)})[key]) for u in (0.0, 1.0)}
    if len(tried) > 1 or config.tune.space is None:
        return len(tried) == 1
    raise ConfigError(
        f"tune.space: {key}: it would be {tried.pop()} in every trial of tune.epochs={config.tune.epochs:g}; "
        "leave it out or raise tune.epochs"
    )


def objective_of(config: StudyConfig, space: Space, *, labelled: bool = False) -> Objective:
    """What trials are ranked by; `labelled`: the images have labels. ConfigError where it cannot rank them."""
    labelled = labelled or config.eval.val_path not in (None, AUTO)
    return choose(config.tune.objective, keys=space, labelled=labelled, k=max(config.eval.k))


def first_points(config: StudyConfig, space: Space) -> list[dict[str, Any]]:
    """Points that are tried before any is proposed: the run's own values, then those asked for, completed by them."""
    plain = config.model_dump(mode="json")
    own = {key: _at(plain, key) for key in space}
    points = [own] if config.tune.try_recipe and config.tune.searcher != "grid" else []
    if config.tune.scheduler == "pb2":  # it moves within the space alone
        points = [point for point in points if _lies_in(space, point)]
    for point in config.tune.first:
        unknown = [key for key in point if key not in space]
        if unknown:
            near = did_you_mean(unknown[0], space) or "; leave it out of tune.first"
            raise ConfigError(
                f"tune.first: {', '.join(unknown)} is not in tune.space ({', '.join(space)}){near}"
            )
        candidate(config, {**own, **point})
        if config.tune.scheduler == "pb2" and not _lies_in(space, {**own, **point}):
            raise ConfigError(
                f"tune.first: {point} is outside of tune.space, which tune.scheduler=pb2 cannot leave; "
                "set tune.scheduler=asha, or leave the point out"
            )
        points.append({**own, **point})
    if len(points) > config.tune.trials and config.tune.searcher != "grid":
        recipe = len(points) > len(config.tune.first)
        raise ConfigError(
            f"tune.trials={config.tune.trials}: too few for the {len(points)} points that are tried first (tune.first"
            f"{' and the recipe' if recipe else ''}); set tune.trials={len(points)}"
            f"{', or tune.try_recipe=false' if recipe else ''}, or shorten tune.first"
        )
    return points


def _lies_in(space: Space, point: Mapping[str, Any]) -> bool:
    return all(domain.holds(point[key]) for key, domain in space.items())


def can_grow(config: StudyConfig) -> bool:
    """Whether more `tune.trials` extend the study: a grid has its points, and a population a place for each trial."""
    return config.tune.searcher != "grid" and config.tune.scheduler != "pb2"


def num_trials(config: StudyConfig, space: Space) -> int:
    """Trials of the search, without those that confirm."""
    if config.tune.searcher == "grid":
        return grid_size(space, config.tune.grid_points) + len(config.tune.first)
    return config.tune.trials


def candidate(config: StudyConfig, params: Mapping[str, Any]) -> Config:
    """The run, in its full length, with a trial's parameters; ConfigError where they do not go together.

    Two are taken for what they can be beside the others: a warm-up of the teacher's temperature starts no higher than
    it ends, and where centering is searched, a momentum of the centre counts in trials with a centre alone. A trial
    is known by the parameters that were proposed, and its run's config has what was taken.
    """
    tree = config.model_dump(mode="json", exclude={"tune"})
    apply_tree(tree, params)
    loss = tree["loss"]
    temps = (loss["warmup_teacher_temp"], loss["teacher_temp"])
    moved = any(key in params for key in (TEACHER_TEMP, WARMUP_EPOCHS, WARMUP_TEMP))
    if moved and all(isinstance(temp, int | float) for temp in temps):
        loss["warmup_teacher_temp"] = min(temps)
    if CENTERING in params and loss["centering"] != "center":
        loss["center_momentum"] = LossConfig.model_fields["center_momentum"].default
    return validate_as(Config, tree)


def trial_config(
    config: StudyConfig,
    params: Mapping[str, Any],
    *,
    name: str,
    storage_path: str,
    seed: int,
    num_images: int,
    init: Mapping[str, Any] | None = None,
) -> Config:
    """The run of one trial: the candidate, shortened, evaluated at even distances, and ended by a collapse.

    `init` replaces the section of this name: the trial goes on from another one.
    """
    tree = candidate(config, params).model_dump(mode="json")
    apply_tree(tree, _warmups(config, params))
    tree["train"] |= {"epochs": config.tune.epochs or config.train.epochs, "seed": seed}
    tree |= {"name": name, "storage_path": storage_path} | ({"init": dict(init)} if init else {})
    total = schedule_of(validate_as(Config, tree), num_images=num_images).total_steps
    every = max(1, math.ceil(total / config.tune.evaluations))
    tree["eval"] |= {"every_steps": every, "label_free": True, "lidar": True}
    tree["eval"]["where"] = "train"  # a trial goes on, or ends, once the score of a step is known
    tree["resources"] |= {"evaluator_cpus": 0, "evaluator_gpus": 0}
    tree["checkpoint"] |= {"every_steps": every, "every_minutes": None}
    tree["log"]["every_steps"] = max(1, min(tree["log"]["every_steps"], every // _LOGGED_PER_EVALUATION))
    tree["health"]["on_collapse"] = "stop"
    tree.pop("cost")  # the cluster's, not one trial's
    if config.tune.scheduler == "pb2":  # others go on from any of them
        tree["checkpoint"]["num_to_keep"] = config.tune.evaluations + 1
    return validate_as(Config, tree)


def _warmups(config: StudyConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Warm-ups of a trial: as they are, up to a share of it; one that is searched keeps its share of the run."""
    plain = candidate(config, params).model_dump(mode="json")
    found = {}
    for key in _WARMUPS:
        epochs = _at(plain, key)
        share = epochs / config.train.epochs
        longest = (share if key in params else max(_WARMUP_SHARE, share)) * (
            config.tune.epochs or config.train.epochs
        )
        if epochs > longest:
            epochs = max(1, round(longest)) if key == WARMUP_EPOCHS else longest
        found[key] = epochs
    return found


def schedule_of(config: Config, *, num_images: int) -> Schedule:
    """A run's schedules, with numbers for `auto`."""
    return Schedule(resolve(config.algorithm(), num_images=num_images).config, num_images=num_images)


def grace_steps(config: StudyConfig, space: Space, *, num_images: int) -> int:
    """Steps before which no trial is given up: the longest warm-up in the space, and `tune.grace` of a trial."""
    longest = {key: max(space[key].grid(2)) for key in (WARMUP_EPOCHS, "optim.warmup_epochs") if key in space}
    trial = trial_config(config, longest, name="0", storage_path="trials", seed=0, num_images=num_images)
    schedule = schedule_of(trial, num_images=num_images)
    return max(1, schedule.settled_step(), math.ceil(config.tune.grace * schedule.total_steps))


def _at(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
