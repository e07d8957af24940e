"""What a study takes of a cluster, or of a Ray of its own, from its config; what a trial that was lost had taken."""

import os
from collections.abc import Mapping, Sequence

from dinoray.jobs.cli.main import is_local
from dinoray.jobs.runs.run_size import check_images, length_warnings
from dinoray.jobs.studies.config import StudyConfig, trial_config
from dinoray.jobs.studies.trial import CLOCK
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.pipeline.data.listing.ignored import Ignored
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.findings.ranking import number_of
from dinoray.pipeline.study.search.plan import StudyPlan, local_cpus, plan_study
from dinoray.pipeline.study.space import Space
from dinoray.pipeline.study.trials import Outcome, Trial, trial_directory
from dinoray.pipeline.tracking.records import read_mapping, read_records


def check_growth(config: StudyConfig, *, is_local: bool) -> None:
    """ResourceError where a Ray of one's own is said to grow: trials would be planned on CPUs that never come."""
    asked = {"cluster_cpus": config.tune.cluster_cpus, "cluster_gpus": config.tune.cluster_gpus}
    said = " ".join(f"tune.{name}={number}" for name, number in asked.items() if number is not None)
    if is_local and said:
        raise ResourceError(
            f"{said}: only a cluster scales up to this size, not a Ray on this machine; "
            f"leave it out, or run the study on a cluster with `{command('submit')}`"
        )


def check_study_size(
    config: StudyConfig, space: Space, num_images: int, ignored: Sequence[Ignored] = ()
) -> list[str]:
    """Warnings about trials of few images or steps. ConfigError where a batch would hold an image more than once."""
    check_images(config, num_images, ignored)
    batches = space.get("train.global_batch_size")
    largest = 0 if batches is None else max(batches.values)
    if largest > num_images:
        raise ConfigError(
            f"tune.space: train.global_batch_size={largest} is more than the {num_images} images of "
            f"{config.data.address}; leave out values above {num_images}"
        )
    trial = trial_config(config, {}, name="0", storage_path="trials", seed=0, num_images=num_images)
    return length_warnings(trial, num_images, epochs_setting="tune.epochs")


def limit_of(config: StudyConfig) -> int | None:
    """Trials at once that are asked for: a population is all of them; None, as many as fit."""
    return config.tune.trials if config.tune.scheduler == "pb2" else config.tune.max_concurrent


def plan_of(config: StudyConfig, num_trials: int, have: Mapping[str, float]) -> StudyPlan:
    """The plan for a cluster that has `have` by kind of resource, or will have what the config says.

    ResourceError where it does not fit.
    """
    gpus = config.tune.cluster_gpus or int(have.get("GPU", 0))
    use_gpu = gpus > 0 if config.resources.use_gpu == "auto" else config.resources.use_gpu
    return plan_study(
        config.resources,
        num_trials=num_trials,
        cpus=config.tune.cluster_cpus or int(have.get("CPU", 0)),
        gpus=gpus,
        use_gpu=use_gpu,
        limit=limit_of(config),
        shares_stream=config.tune.share_stream,
        num_streams=config.data.streams,
        all_at_once=config.tune.scheduler == "pb2",
        grows=not is_local(),
    )


def local_cores(config: StudyConfig) -> int:
    """Logical CPUs for a Ray of the study's own on this machine."""
    return local_cpus(
        config.resources,
        cores=os.cpu_count() or 1,
        limit=limit_of(config),
        shares_stream=config.tune.share_stream,
        num_streams=config.data.streams,
    )


def lost_outcome(study: Directory, trial: Trial, error: str, plan: StudyPlan) -> Outcome:
    """Of a trial that failed for good, with nobody left to say how far it was: as far as it has written down."""
    run = trial_directory(study, trial)
    clock = read_mapping(run, CLOCK)
    seconds = number_of(clock.get("seconds")) or 0.0
    return Outcome(
        "failed",
        None,
        read_records(run).last_step or 0,
        message=error,
        seconds=seconds,
        start_seconds=number_of(clock.get("start_seconds")) or 0.0,
        cpu_hours=plan.cpus_each * seconds / 3600,
        gpu_hours=plan.gpus_each * seconds / 3600,
    )
