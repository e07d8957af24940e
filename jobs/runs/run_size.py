"""Check that a run has enough images, steps and CPU cores before Ray starts: refuse what is useless, warn of the rest.

Every line names a setting, its value, the rule, and a value that ends the error or warning.
"""

import math
import os
from collections.abc import Callable, Sequence

import torch

from dinoray.jobs.cli.main import check_gpus, is_local
from dinoray.models.counts import count
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.data.listing.ignored import Ignored, ignored_line
from dinoray.pipeline.training.config import Schedule
from dinoray.pipeline.worker.config import Config

FEW_IMAGES = 500
"""Below this many images a network that starts from noise learns little that carries over to others."""
FEW_STEPS = 300
"""Below this many steps the networks hardly leave where they start: the demo takes 810."""
FEW_WARMUP_STEPS = 10
"""A learning rate that rises in fewer steps is as good as one that does not rise."""


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(config: Config) -> list[str]:
    """Warnings about train workers on this machine's CPUs; none where a cluster is joined, whose nodes may come later.

    ResourceError for more than two workers per core, which take memory and time and change no result, and for more
    workers than GPUs.
    """
    resources, cores = config.resources, available_cores()
    workers = resources.most_workers
    if not is_local():
        return []
    if _trains_on_gpus(resources):
        check_gpus(resources, torch.cuda.device_count())
        return []
    if workers <= cores:
        return []
    parts = config.train.accumulate_steps
    fitting = _workers_that_fit(config.train.global_batch_size, parts, cores)
    line = (
        f"resources.train_workers={workers} on {count(cores, 'CPU core')} without a GPU: "
        f"workers share cores, which makes them slower; set resources.train_workers={fitting}"
    )
    if workers > 2 * cores:
        raise ResourceError(f"{line} (at most {2 * cores} here); the result is the same")
    return [line]


def check_more_than_one(config: Config, num_images: int, ignored: Sequence[Ignored] = ()) -> None:
    """ConfigError for a single image, which says what is `ignored` beside it: that may be the images."""
    if num_images < 2:
        raise ConfigError(
            f"{config.data.address} holds 1 image, but pretraining needs at least 2; add images{_beside(ignored)}"
        )


def check_images(config: Config, num_images: int, ignored: Sequence[Ignored] = ()) -> None:
    """ConfigError where a batch holds an image more than once, which says what is `ignored` beside them."""
    batch, workers, parts = (
        config.train.global_batch_size,
        config.resources.most_workers,
        config.train.accumulate_steps,
    )
    check_more_than_one(config, num_images, ignored)
    if batch <= num_images:
        return
    unit = workers * parts
    changes = {}
    if unit > num_images:
        changes = {"resources.train_workers": 1} if workers > 1 else {}
        changes |= {"train.accumulate_steps": 1} if parts > 1 else {}
        unit = 1
    changes = {"train.global_batch_size": _batch_that_fits(unit, num_images), **changes}
    remedy = " ".join(f"{key}={value}" for key, value in changes.items())
    raise ConfigError(
        f"train.global_batch_size={batch} is more than the {num_images} images of {config.data.address}, so "
        f"a batch would hold an image up to {math.ceil(batch / num_images)} times; set {remedy}, or add images"
        f"{_beside(ignored)}"
    )


def _beside(ignored: Sequence[Ignored]) -> str:
    line = ignored_line(ignored)
    return "" if line is None else f" ({line})"


def length_warnings(config: Config, num_images: int, *, epochs_setting: str = "train.epochs") -> list[str]:
    """Warnings about a run of few images or few steps; `epochs_setting` is the one that sets its length."""
    total_steps = Schedule(config, num_images=num_images).total_steps
    batch, found = config.train.global_batch_size, []
    if num_images < FEW_IMAGES and config.init.path is None and not config.backbone.pretrained:
        found.append(
            f"{config.data.address} holds {num_images} images, fewer than {FEW_IMAGES}: too few to train from "
            "random weights; add images, or start from trained weights with --init-from"
        )
    if (frozen := config.init.freeze_steps) != "auto" and frozen >= total_steps:
        found.append(
            f"init.freeze_steps={frozen} leaves none of {total_steps} steps for the backbone, which stays as it is; "
            f"set init.freeze_steps=auto, or {total_steps // 5} or fewer"
        )
    if total_steps < FEW_STEPS:
        found.append(
            f"{epochs_setting}={config.train.epochs:g} makes {total_steps} steps of {batch} images, fewer than "
            f"{FEW_STEPS}: too few to learn much; set {epochs_setting}={_epochs_for(FEW_STEPS, batch, num_images)}"
        )
    return found


def warmup_warnings(config: Config, num_images: int) -> list[str]:
    """Warnings about warm-ups that do not end within the run, or that are over at once.

    None for a run of few steps: `length_warnings` proposes another length, in which they may be right.
    """
    schedule, found = Schedule(config, num_images=num_images), []
    if schedule.total_steps < FEW_STEPS:
        return []
    epochs, warmup = config.train.epochs, config.optim.warmup_epochs
    warmup_steps = round(schedule.steps(warmup))
    if warmup_steps >= schedule.total_steps:
        found.append(
            f"optim.warmup_epochs={warmup:g} would not end within train.epochs={epochs:g} and is cut to "
            f"{schedule.warmup_steps} steps; set optim.warmup_epochs={_rounded_down(0.1 * epochs):g}"
        )
    elif 0 < warmup_steps < FEW_WARMUP_STEPS:
        # In parts of an epoch, because one epoch may be the whole run.
        longer = _rounded_up(FEW_WARMUP_STEPS * config.train.global_batch_size / num_images)
        found.append(
            f"optim.warmup_epochs={warmup:g} is {warmup_steps} steps, fewer than {FEW_WARMUP_STEPS}: the learning rate "
            f"starts near its peak; set optim.warmup_epochs={longer:g}"
        )
    temp_epochs = config.loss.warmup_teacher_temp_epochs
    if schedule.warmup_temp_epochs < temp_epochs:
        found.append(
            f"loss.warmup_teacher_temp_epochs={temp_epochs} would not end within train.epochs={epochs:g} and is cut; "
            f"set loss.warmup_teacher_temp_epochs={schedule.warmup_temp_epochs}"
        )
    return found


def _trains_on_gpus(resources: ResourcesConfig) -> bool:
    if resources.use_gpu == "auto":
        return torch.cuda.is_available()
    return resources.use_gpu


def _workers_that_fit(batch: int, parts: int, cores: int) -> int:
    """The most workers, one per core, among which the batch and its parts divide."""
    return next((n for n in range(cores, 1, -1) if batch % n == 0 and batch // n % parts == 0), 1)


def _batch_that_fits(unit: int, num_images: int) -> int:
    """A multiple of `unit` by a power of two: at most half of the images if it can be, else at most all."""
    batch = unit
    while 4 * batch <= num_images:
        batch *= 2
    return batch


def _epochs_for(steps: int, batch: int, num_images: int) -> int:
    """The least whole number of epochs that makes at least `steps` steps."""
    return math.ceil(steps * batch / num_images)


def _rounded_down(epochs: float) -> float:
    """To two digits."""
    return _rounded(epochs, math.floor)


def _rounded_up(epochs: float) -> float:
    """To two digits."""
    return _rounded(epochs, math.ceil)


def _rounded(epochs: float, to_whole: Callable[[float], int]) -> float:
    digits = 1 - math.floor(math.log10(epochs))
    return to_whole(epochs * 10**digits) / 10**digits
