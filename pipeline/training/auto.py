"""Choose numbers for settings that are `auto`, from the number of images and the batch size.

`resolve` replaces each `auto` by a number and returns the reason. It is a pure function, so a resumed run
gets the numbers that it began with. The rules follow published experience: small data sets need few
prototypes, sharp targets and a fast teacher; small batches need a slow teacher.
"""

import math
from typing import Any, NamedTuple

from dinoray.pipeline.augment.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig
from dinoray.pipeline.data.measured import NOTHING, Measured
from dinoray.pipeline.training.config import DINOConfig, Schedule

_SMALL, _LARGE = 20_000, 1_000_000
"""Numbers of images between which temperature and momentum change, linearly in the logarithm."""


class Resolved(NamedTuple):
    """A config without `auto`, and one line per number with its reason."""

    config: DINOConfig
    reasons: list[str]


def resolve(config: DINOConfig, *, num_images: int, measured: Measured = NOTHING) -> Resolved:
    """Replace auto by numbers in `head.out_dim`, `loss.teacher_temp` and `teacher.teacher_momentum`.

    `measured`: what takes the place of auto in `data` and `crops`.
    """
    changes: dict[str, dict[str, Any]] = {
        "head": {},
        "loss": {},
        "teacher": {},
        **_measured(config, measured),
    }
    reasons = [measured.line] if measured.line else []
    if config.head.out_dim == "auto":
        changes["head"]["out_dim"] = out_dim(num_images)
        reasons.append(
            f"head.out_dim={out_dim(num_images)}: the power of 2 nearest to a prototype for each 16 of "
            f"{num_images} images, 1024 to 65536"
        )
    if config.loss.teacher_temp == "auto":
        warms_up = config.loss.warmup_teacher_temp_epochs > 0
        temp = teacher_temp(num_images, warms_up=warms_up)
        changes["loss"] = {
            "teacher_temp": temp,
            "warmup_teacher_temp": min(config.loss.warmup_teacher_temp, temp),
        }
        limit = "" if warms_up else ", at most 0.06 without loss.warmup_teacher_temp_epochs"
        reasons.append(
            f"loss.teacher_temp={temp:g}: 0.02 up to {_SMALL} images, 0.07 from {_LARGE} on{limit}; "
            f"there are {num_images}"
        )
    if config.teacher.teacher_momentum == "auto":
        total_steps = Schedule(config, num_images=num_images).total_steps
        momentum = teacher_momentum(
            num_images, global_batch_size=config.train.global_batch_size, total_steps=total_steps
        )
        changes["teacher"]["teacher_momentum"] = momentum
        reasons.append(
            f"teacher.teacher_momentum={momentum:g}: 0.99 up to {_SMALL} images, 0.996 from {_LARGE} on, slower in "
            f"proportion below a batch of 512, but within a tenth of the run; there are {num_images} images, "
            f"batch {config.train.global_batch_size}, {total_steps} steps"
        )
    tree = config.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return Resolved(DINOConfig.model_validate(tree), reasons)


def measures_pixels(crops: CropsConfig) -> bool:
    """Return True if mean and spread of the pixels are to be measured, whatever the images are."""
    return "auto" in (crops.pixel_mean, crops.pixel_std)


def _measured(config: DINOConfig, measured: Measured) -> dict[str, dict[str, Any]]:
    """Return by section what was measured of the pixels, where it is auto or left at the default."""
    crops, is_rgb = config.crops, config.crops.channels == 3
    values = {
        "pixel_mean": (measured.mean, IMAGENET_MEAN, (0.5,) * crops.channels),
        "pixel_std": (measured.std, IMAGENET_STD, (0.25,) * crops.channels),
    }
    changes = {
        name: found or (imagenet if is_rgb else middling)
        for name, (found, imagenet, middling) in values.items()
        if getattr(crops, name) == "auto" or ((found or not is_rgb) and getattr(crops, name) == imagenet)
    }
    return {"crops": changes, "data": measured.settle(config.data)}


def out_dim(num_images: int) -> int:
    """Return the number of prototypes: the power of two nearest to num_images / 16, from 1024 to 65536."""
    return 2 ** min(16, max(10, round(math.log2(max(1, num_images) / 16))))


def teacher_temp(num_images: int, *, warms_up: bool) -> float:
    """Return 0.02 to 0.07, linear in the log of the number of images; at most 0.06 without warm-up.

    A constant temperature above 0.06 collapses.
    """
    temp = 0.02 + 0.05 * _between(num_images)
    return round(temp if warms_up else min(temp, 0.06), 4)


def teacher_momentum(num_images: int, *, global_batch_size: int, total_steps: int) -> float:
    """Return 0.99 to 0.996, by the number of images; higher for batches below 512.

    1 - momentum is at least 10 / total_steps, so that the teacher follows within the run, and at most 0.1.
    """
    change = (1 - (0.99 + 0.006 * _between(num_images))) * min(1.0, global_batch_size / 512)
    return round(1 - min(0.1, max(change, 10 / total_steps)), 6)


def _between(num_images: int) -> float:
    """Return 0 up to `_SMALL` images, 1 from `_LARGE` on, and linear in the logarithm between them."""
    share = math.log(max(1, num_images) / _SMALL) / math.log(_LARGE / _SMALL)
    return min(1.0, max(0.0, share))
