"""The number of concurrent trials and their resources, fixed before a study starts: no trial waits for ever.

Two situations would block a trial. Trials may reserve every CPU, so that none is left for Ray Data's own
tasks. Or more trials start than fit, each holding resources that another trial needs. No Ray here: numbers
in, numbers out.
"""

from dataclasses import dataclass
from math import ceil, floor

from dinoray.models.errors import ResourceError
from dinoray.pipeline.cluster.resources import ResourcesConfig

_FOR_RAY = 1
"""CPUs that stay free: each of Ray Data's own tasks reserves a whole CPU."""


@dataclass(frozen=True)
class StudyPlan:
    """Resources that a study takes from a cluster; CPUs are Ray's logical CPUs."""

    trials_at_once: int
    cpus_each: float
    """CPUs per trial: its train workers, and its minimum of augment actors unless they are shared."""
    gpus_each: int
    augment_actors: tuple[int, int]
    """Minimum and maximum number per trial, or of all trials together if they are shared."""
    cpus_shared: float
    """CPUs of augment actors that all trials share."""
    cpus: int
    """CPUs that the cluster has, or will have."""
    gpus: int

    @property
    def cpus_needed(self) -> int:
        """Return the total number of CPUs, including the reserve for Ray Data."""
        return ceil(self.trials_at_once * self.cpus_each + self.cpus_shared) + _FOR_RAY

    @property
    def cpus_for_data(self) -> float:
        """Return the remaining CPUs: for augment actors beyond the minimum, and for Ray Data's own tasks."""
        return self.cpus - self.trials_at_once * self.cpus_each - self.cpus_shared

    def describe(self) -> str:
        """Format the plan as one line."""
        gpus = f" and {self.gpus_each} GPUs" if self.gpus_each else ""
        of_gpus = f" and {self.gpus} GPUs" if self.gpus_each else ""
        shared = f", {self.cpus_shared:g} CPUs augment for all of them" if self.cpus_shared else ""
        return (
            f"plan: {self.trials_at_once} trials at once, {self.cpus_each:g} CPUs{gpus} each{shared}, "
            f"{self.cpus_for_data:g} CPUs left for data, of {self.cpus} CPUs{of_gpus}"
        )


def plan_study(
    resources: ResourcesConfig,
    *,
    num_trials: int,
    cpus: int,
    gpus: int,
    use_gpu: bool,
    limit: int | None,
    shares_stream: bool,
    num_streams: int = 1,
    all_at_once: bool = False,
    grows: bool = True,
) -> StudyPlan:
    """Return the plan for `cpus` and `gpus`; raise ResourceError, with the numbers, if the trials do not fit.

    `limit`: requested number of concurrent trials; None takes as many as fit. `all_at_once`: all trials must
    run at once, because they form a population. `num_streams`: of each trial. `grows`: the cluster may grow later.
    """
    least, most = resources.least_actors(num_streams), resources.actor_range[1]
    cpus_each, cpus_shared = _cpus(resources, num_streams, shares_stream=shares_stream)
    gpus_each = resources.most_workers if use_gpu else 0
    fit = floor((cpus - _FOR_RAY - cpus_shared) / cpus_each) if cpus_each else num_trials
    if gpus_each:
        fit = min(fit, gpus // gpus_each)
    asked = min(limit or max(1, fit), num_trials)
    if asked > fit:
        need = f"{asked} trials at once need {ceil(asked * cpus_each + cpus_shared)} CPUs"
        need += f" and {asked * gpus_each} GPUs" if gpus_each else ""
        if all_at_once:
            remedy = f"set tune.trials={fit}, or set " if fit > 1 else "set "
            remedy += "tune.scheduler=asha, whose trials may wait"
        else:
            remedy = f"set tune.max_concurrent={fit}"
        if fit < 1:
            remedy = _less_of_one(gpus_each, gpus)
        raise ResourceError(
            f"{need}, and {_FOR_RAY} CPU must stay free for Ray Data; the cluster has {cpus} CPUs"
            f"{f' and {gpus} GPUs' if gpus_each else ''}: {remedy}"
            + (
                ", or, if nodes will join, say how many there will be with tune.cluster_cpus and tune.cluster_gpus"
                if grows
                else ""
            )
        )
    spare = floor((cpus - _FOR_RAY - cpus_shared - asked * cpus_each) / resources.cpus_per_augment_actor)
    reach = least + (spare if shares_stream else spare // asked)
    return StudyPlan(
        trials_at_once=asked,
        cpus_each=cpus_each,
        gpus_each=gpus_each,
        augment_actors=(least, max(least, min(reach, most or reach))),
        cpus_shared=cpus_shared,
        cpus=cpus,
        gpus=gpus,
    )


def local_cpus(
    resources: ResourcesConfig, *, cores: int, limit: int | None, shares_stream: bool, num_streams: int = 1
) -> int:
    """Return the logical CPUs of a local Ray on a machine of `cores`; the operating system shares the cores.

    The number allows as many concurrent trials as have all their cores, at least one; or the `limit`.
    """
    alone, _ = _cpus(resources, num_streams, shares_stream=False)
    at_once = limit or max(1, floor(cores / alone))
    cpus_each, cpus_shared = _cpus(resources, num_streams, shares_stream=shares_stream)
    return max(cores, ceil(at_once * cpus_each + cpus_shared) + _FOR_RAY)


def _less_of_one(gpus_each: int, gpus: int) -> str:
    """Return the remedy where not even one trial fits."""
    if gpus_each > gpus:
        return f"set resources.train_workers={gpus}" if gpus else "set resources.use_gpu=false"
    return (
        "lower resources.train_workers, resources.augment_actors, resources.cpus_per_train_worker or "
        "resources.cpus_per_augment_actor"
    )


def _cpus(resources: ResourcesConfig, num_streams: int, *, shares_stream: bool) -> tuple[float, float]:
    """Return the CPUs of a trial, and the CPUs that all trials share."""
    train = resources.train_cpus
    augment = resources.least_actors(num_streams) * resources.cpus_per_augment_actor
    return (train, augment) if shares_stream else (train + augment, 0.0)
