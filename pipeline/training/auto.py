"""Choose numbers for settings from the number of images, the batch and the length of a run.

`resolve` replaces each `auto` by a number and returns the reason; the recipe auto (jobs/cli/auto_recipe.py) takes its
numbers from the same rules. All are pure functions.

Sources: the ablations of DINO (arXiv 2104.14294, section 5.3 and appendix) for temperatures and the number of
prototypes; its defaults for the momentum at a batch of 512, and its README, which raises it for small batches; issue
246 of its code for the momentum of the centre. That few images need few prototypes and a fast teacher is also how
lightly-train documents its defaults; the numbers here are others. For small data sets: our runs of a narrow ResNet on
2,853 photos of 20 classes, at a batch of 64.
"""

import math
from typing import Any, NamedTuple

from dinoray.pipeline.augment.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig
from dinoray.pipeline.data.measured import NOTHING, Measured
from dinoray.pipeline.training.config import DINOConfig, Schedule

SMALL, LARGE = 20_000, 1_000_000
"""Numbers of images between which the temperature changes, linearly in the logarithm."""
_CENTER_IMAGES = 640
"""Images that the centre averages over at least: ten batches of 64, the smallest that we have seen to be healthy."""


class Chosen(NamedTuple):
    """A number, and the reason for it in a few words."""

    value: Any
    reason: str


class Resolved(NamedTuple):
    """A config without `auto`, and one line per number with its reason."""

    config: DINOConfig
    reasons: list[str]


def resolve(
    config: DINOConfig,
    *,
    num_images: int,
    measured: Measured = NOTHING,
    began: DINOConfig | None = None,
) -> Resolved:
    """Replace auto by numbers in `head.out_dim`, `loss.teacher_temp` and `teacher.teacher_momentum`.

    `measured`: what takes the place of auto in `data` and `crops`. `began`: the config in the checkpoints of the run,
    whose numbers stay, also if an earlier version chose them by other rules.
    """
    changes: dict[str, dict[str, Any]] = {
        "head": {},
        "loss": {},
        "teacher": {},
        **_measured(config, measured),
    }
    reasons = [measured.line] if measured.line else []

    def put(section: str, name: str, chosen: Chosen) -> None:
        if began is not None:
            chosen = Chosen(getattr(getattr(began, section), name), "as this run began")
        changes[section][name] = chosen.value
        reasons.append(f"{section}.{name}={chosen.value:g}: {chosen.reason}")

    if config.head.out_dim == "auto":
        put("head", "out_dim", out_dim(num_images))
    if config.loss.teacher_temp == "auto":
        put(
            "loss",
            "teacher_temp",
            teacher_temp(num_images, warms_up=config.loss.warmup_teacher_temp_epochs > 0),
        )
        changes["loss"]["warmup_teacher_temp"] = (
            min(config.loss.warmup_teacher_temp, changes["loss"]["teacher_temp"])
            if began is None
            else began.loss.warmup_teacher_temp
        )
    if config.teacher.teacher_momentum == "auto":
        total_steps = Schedule(config, num_images=num_images).total_steps
        batch = config.train.global_batch_size
        put("teacher", "teacher_momentum", teacher_momentum(global_batch_size=batch, total_steps=total_steps))
    tree = config.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return Resolved(DINOConfig.model_validate(tree), reasons)


def has_auto(config: DINOConfig) -> bool:
    """Return True if a number is left to `resolve`."""
    return "auto" in (config.head.out_dim, config.loss.teacher_temp, config.teacher.teacher_momentum)


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


def out_dim(num_images: int) -> Chosen:
    """Return the number of prototypes: the power of two nearest to num_images / 16, from 512 to 65536."""
    value = 2 ** min(16, max(9, round(math.log2(max(1, num_images) / 16))))
    return Chosen(
        value, f"{num_images:,} images; the power of 2 nearest to a prototype for each 16, 512 to 65536"
    )


def teacher_temp(num_images: int, *, warms_up: bool) -> Chosen:
    """Return 0.05 to 0.07, linear in the log of the number of images; 0.05 without warm-up.

    A constant temperature above 0.06 collapses, and 0.06 is worse than 0.04. On 2,853 photos at a batch of 64, 0.03 was
    too sharp (the entropy fell to 8 % of its maximum), and 0.05 the healthiest.
    """
    value = round(0.05 + (0.02 * _between(num_images) if warms_up else 0), 4)
    limit = "" if warms_up or num_images <= SMALL else ", which needs loss.warmup_teacher_temp_epochs"
    return Chosen(
        value,
        f"{num_images:,} images; 0.05 up to {SMALL:,}, where 0.03 is too sharp, 0.07 from {LARGE:,} on{limit}",
    )


def teacher_momentum(*, global_batch_size: int, total_steps: int, least: float = 0.996) -> Chosen:
    """Return 0.996 at a batch of 512, as published; slower in proportion below, up to 0.9999.

    But the teacher follows within a twentieth of the run, 1 - momentum >= 20 / total_steps, down to `least`. That is
    0.996 for ViTs: at 0.99 one of three seeds of the demo collapsed (benchmarks/RESULTS.md). lightly's benchmark of
    ResNet-18 has 0.99; a narrow ResNet was healthy at 0.98.
    """
    change = max(0.004 * min(1.0, global_batch_size / 512), min(1 - least, 20 / total_steps))
    return Chosen(
        round(1 - change, 6),
        f"batch {global_batch_size}, {total_steps:,} steps; 0.996 from a batch of 512 on, slower in proportion below, "
        f"but within a twentieth of the run, at least {least:g}",
    )


def center_momentum(global_batch_size: int) -> Chosen:
    """Return 0.9 for batches of 64 and more, up to 0.99 for smaller ones, whose means are noisy."""
    value = round(min(0.99, max(0.9, 1 - global_batch_size / _CENTER_IMAGES)), 4)
    return Chosen(
        value,
        f"batch {global_batch_size}; 0.9 from 64 on, slower below, so that the centre is the mean of more images",
    )


def peak_lr(global_batch_size: int) -> Chosen:
    """Return the peak learning rate of AdamW: 1e-3 at a batch of 512, in proportion above, to its cube root below.

    1e-3 at 512 is published for ViT-S; 5e-4 at 64 is what the recipe photos_small trains a ViT-Ti with.
    """
    share = global_batch_size / 512
    return Chosen(
        1e-3 * (share if share > 1 else share ** (1 / 3)), "1e-3 at a batch of 512, to the cube root below"
    )


def _between(num_images: int) -> float:
    """Return 0 up to `SMALL` images, 1 from `LARGE` on, and linear in the logarithm between them."""
    share = math.log(max(1, num_images) / SMALL) / math.log(LARGE / SMALL)
    return min(1.0, max(0.0, share))
