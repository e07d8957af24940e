"""The recipe auto: what is known of images and devices -> settings, each with its reason in one line.

`choose` is a pure function. Settings of the user win, and the choices that depend on them follow. The order of the
groups below is the order in which they depend on each other; numbers that are rules of the algorithm stand in
pipeline/training/auto.py, sizes of networks, crops and batches in auto_sizes.py.

Sources: the defaults, ablations and README of DINO (arXiv 2104.14294) for ViTs; lightly's benchmarks for ResNet-18 on
9,469 and on 50,000 images; for CPUs our runs of some minutes on 2,853 photos of 20 classes at a batch of 64: the narrow
ResNet that is chosen raised k-NN from 37.3 to 44.9 %, a ViT of width 96 and depth 3 from 33.0 to 36.9 %.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dinoray.jobs.cli import auto_sizes as sizes
from dinoray.jobs.cli.auto_facts import Choice, Choices, Facts
from dinoray.models.counts import count
from dinoray.models.settings import flatten
from dinoray.pipeline.training import auto
from dinoray.pipeline.training.auto import SMALL
from dinoray.pipeline.training.config import CheckpointConfig

AUTO = "auto"
"""Name of the recipe."""
TYPICAL = Facts(num_images=1_281_167, width=500, height=375, gpus=1)
"""Stands for images that are not looked at: those of ImageNet, on one GPU."""
_GPU_EPOCHS, _GPU_EPOCHS_MANY, _MANY = 200, 100, 100_000
_LEAST_STEPS = 1_000
_CPU_IMAGES, _MOST_CORES = 100_000, 16
"""Images that a run on CPUs takes for each core, which is some minutes, and cores that are counted at most."""
_SHORT_STEPS = 5_000
_LEAST_BATCH_FOR_BN = 16


def choose(facts: Facts, settings: Mapping[str, Any]) -> list[Choice]:
    """Return what is not in `settings`, a tree of the user's settings, in the order in which it was chosen."""
    choices = Choices(facts, settings)
    network = sizes.choose_network(choices)
    sizes.choose_crops(choices, network)
    _choose_colours(choices)
    batch = sizes.choose_batch(choices, network)
    epochs = _choose_epochs(choices, batch)
    total_steps = max(1, math.floor(epochs * facts.num_images / batch))
    _choose_optimiser(choices, network, batch=batch, epochs=epochs)
    _choose_head(choices, network, batch=batch)
    _choose_loss(choices, batch=batch, epochs=epochs)
    _choose_teacher(choices, network, batch=batch, total_steps=total_steps)
    _choose_evaluation(choices, total_steps=total_steps)
    return choices.made


def typical(settings: Mapping[str, Any]) -> Facts:
    """Return `TYPICAL` with the channels that the settings name."""
    channels = dict(flatten(settings)).get("data.channels")
    return TYPICAL._replace(channels=channels) if type(channels) is int else TYPICAL


def as_tree(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the choices as a tree of settings."""
    tree: dict[str, Any] = {}
    for key, value, _ in choices:
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = value
    return tree


def _choose_colours(choices: Choices) -> None:
    facts = choices.facts
    if facts.channels != 3:
        is_gray = facts.channels == 1
        what = (
            "gray stays gray whatever its hue and saturation"
            if is_gray
            else "hue and saturation are those of RGB"
        )
        reason = f"images of {count(facts.channels, 'channel')}; {what}"
        for name in ("saturation", "hue", "gray_prob"):
            choices.take(f"crops.{name}", 0.0, reason)
    elif facts.num_images < SMALL:
        reason = f"{facts.images}; below {SMALL:,} colours are changed less"
        choices.take("crops.hue", 0.05, reason)
        choices.take("crops.gray_prob", 0.1, reason)


def _choose_epochs(choices: Choices, batch: int) -> float:
    facts = choices.facts
    least = math.ceil(_LEAST_STEPS * batch / facts.num_images)
    if choices.gpus:
        usual = _GPU_EPOCHS if facts.num_images < _MANY else _GPU_EPOCHS_MANY
        reason = f"{_GPU_EPOCHS} below {_MANY:,} images, {_GPU_EPOCHS_MANY} from there on"
        epochs = max(usual, least)
    else:
        cores = min(_MOST_CORES, facts.cpus)
        epochs = min(_GPU_EPOCHS, max(1, round(_CPU_IMAGES * cores / facts.num_images)))
        reason = f"about {_CPU_IMAGES:,} images for each of {cores} CPU cores, at most {_GPU_EPOCHS} epochs"
        if epochs == _GPU_EPOCHS:
            epochs = max(epochs, least)
    more = f", and at least {_LEAST_STEPS:,} steps" if epochs == least > _GPU_EPOCHS else ""
    return choices.number("train.epochs", epochs, f"{facts.images}; {reason}{more}")


def _choose_optimiser(choices: Choices, network: sizes.Network, *, batch: int, epochs: float) -> None:
    facts, name = choices.facts, choices.given("optim.name", "adamw")
    if name == "adamw":
        rate = auto.peak_lr(batch)
        peak = 2 * rate.value if network.is_small else rate.value
        twice = ", twice that for a network of half the width" if network.is_small else ""
        choices.take(
            "optim.base_lr",
            _round(peak * 256 / batch),
            f"batch {batch}; a peak of {_round(peak):g}: {rate.reason}{twice}",
        )
    else:
        published = {"lars": 0.3, "sgd": 0.03}.get(name)
        if published is not None:
            choices.take("optim.base_lr", published, f"optim.name={name}; as published for ResNet-50")
    least = 10 * batch / facts.num_images
    warmup = _round(min(0.5 * epochs, max(least, min(10, 0.1 * epochs))))
    choices.take(
        "optim.warmup_epochs",
        warmup,
        f"{epochs:g} epochs; a tenth, at most 10, and at least 10 steps of them",
    )
    if facts.num_images < SMALL:
        reason = f"{facts.images}; below {SMALL:,} "
        choices.take(
            "optim.final_weight_decay", 0.04, f"{reason}the weight decay stays what it is at the start"
        )
        choices.take("optim.freeze_last_layer_epochs", 0, f"{reason}the prototypes train from the first step")


def _choose_head(choices: Choices, network: sizes.Network, *, batch: int) -> None:
    facts = choices.facts
    number = auto.out_dim(facts.num_images)
    choices.take("head.out_dim", number.value, number.reason)
    if batch < _LEAST_BATCH_FOR_BN:
        choices.take("head.use_bn", False, f"batch {batch}; the statistics of fewer than 16 images are noise")
    elif network.is_convolutional or facts.num_images < SMALL:
        why = (
            "a convolutional network" if network.is_convolutional else f"{facts.images}, fewer than {SMALL:,}"
        )
        choices.take("head.use_bn", True, f"{why}; batch norm leaves the plateau of the first steps soon")
    else:
        choices.take(
            "head.use_bn", False, f"a ViT on {facts.images}; as published, 69.7 % k-NN against 68.6 %"
        )
    if network.is_small:
        reason = "a network of half the width; a head of 2048 would take longer than the network"
        choices.take("head.hidden_dim", 512, reason)
        choices.take("head.bottleneck_dim", 64, reason)


def _choose_loss(choices: Choices, *, batch: int, epochs: float) -> None:
    facts = choices.facts
    warm = choices.number(
        "loss.warmup_teacher_temp_epochs",
        round(0.3 * epochs) if facts.num_images > SMALL else 0,
        f"{facts.images}; "
        + (
            f"30 % of {epochs:g} epochs"
            if facts.num_images > SMALL
            else f"none up to {SMALL:,}: 0.05 is safe at once"
        ),
    )
    temp = auto.teacher_temp(facts.num_images, warms_up=warm > 0)
    start = choices.given_number("loss.warmup_teacher_temp")
    value = temp.value if start is None or not warm else max(temp.value, start)
    value = choices.number("loss.teacher_temp", value, temp.reason)
    if warm:
        choices.take(
            "loss.warmup_teacher_temp", min(0.04, value), "0.04 as published, and not above loss.teacher_temp"
        )
    if choices.given("loss.centering", "center") == "center":
        momentum = auto.center_momentum(batch)
        choices.take("loss.center_momentum", momentum.value, momentum.reason)


def _choose_teacher(choices: Choices, network: sizes.Network, *, batch: int, total_steps: int) -> None:
    least = 0.98 if network.is_small else 0.99 if network.is_convolutional else 0.996
    momentum = auto.teacher_momentum(global_batch_size=batch, total_steps=total_steps, least=least)
    choices.take("teacher.teacher_momentum", momentum.value, momentum.reason)
    is_short = total_steps < 2 * _SHORT_STEPS
    choices.take(
        "teacher.final_teacher_momentum",
        0.999 if is_short else 1.0,
        f"{total_steps:,} steps; 0.999 below {2 * _SHORT_STEPS:,}, where a teacher at rest would miss the last of them",
    )


def _choose_evaluation(choices: Choices, *, total_steps: int) -> None:
    facts = choices.facts
    if facts.num_classes > 1:
        each = facts.num_images // facts.num_classes
        if each < 50:
            choices.take(
                "eval.k",
                [max(1, each // 5)],
                f"{facts.num_classes} classes of about {each} images; as many neighbours as a fifth of them",
            )
    if total_steps < _SHORT_STEPS:
        reason = f"{total_steps:,} steps; five times in the run"
        every = max(1, math.ceil(total_steps / 5))
        choices.take("eval.every_steps", every, reason)
        usual = CheckpointConfig.model_fields["every_steps"].default
        choices.take("checkpoint.every_steps", min(every, usual), reason)


def _round(number: float) -> float:
    """Return a number with two digits that count."""
    return float(f"{number:.2g}")
