"""The recipe auto's sizes: network, crops, batch and train workers, by the images and the memory that there are.

Pure functions. A network of the user's own is taken as it is; its name says the side of its patches, if it has any.
"""

import re
from typing import NamedTuple

from dinoray.jobs.cli.auto_facts import Choices
from dinoray.models.counts import count
from dinoray.pipeline.training.auto import LARGE

_FEW_FOR_A_VIT = 10_000
"""Images below which a ResNet is chosen: lightly's benchmark of ResNet-18 has 9,469."""
_GPUS_FOR_A_BASE = 8
_CPU_SIZE, _RESNET_SIZE, _VIT_SIZE = 48, 128, 224
_SMALL_SIZE = 96
"""Side of a global crop below which local crops, of 3/7 of it, show too little."""
_UNIT, _LEAST_SIDE = 16, 32
_LOCAL_SHARE = 3 / 7
_CPU_BATCH, _RESNET_BATCH, _VIT_BATCH = 64, 256, 512
_LEAST_SHARE = 16
"""Images that each train worker should have of a batch."""
_IMAGE_BYTES = {"vit_small_patch16_224": 0.24e9, "vit_base_patch16_224": 0.5e9, "resnet18": 0.026e9}
"""Memory that a step takes for an image at the sizes above, at most: 15.4 GB for 64 images of ViT-S with 10 local crops
(DINO), 6.6 GB for 256 of ResNet-18 (lightly); ViT-B is twice as wide."""
_USABLE = 0.8


class Network(NamedTuple):
    """The network, as far as other choices depend on it."""

    name: str
    is_convolutional: bool
    is_small: bool
    """The network for CPUs, chosen here."""
    patch: int
    """Side of a patch in pixels; 1: it has none."""


def choose_network(choices: Choices) -> Network:
    """Choose a backbone for the number and size of the images and the devices."""
    facts, gpus, key = choices.facts, choices.gpus, "backbone.name"
    is_small = False
    if choices.has(key):
        name = str(choices.given(key))
    elif choices.has("backbone.kwargs"):
        name = "vit_tiny_patch16_224"
        choices.take(key, name, "backbone.kwargs is set; the arguments are taken for a ViT's")
    elif not gpus:
        name, is_small = "resnet10t", True
        where = f"{facts.images} and no GPU"
        choices.take(key, name, f"{where}; of the networks that CPUs train in minutes it learned most")
        choices.take(
            "backbone.kwargs", {"channels": [32, 64, 128, 256], "stem_width": 16}, f"{where}; half the width"
        )
    else:
        name = _for_gpus(choices, gpus)
    found = re.search(r"patch(\d+)", name)
    kwargs = choices.given_number("backbone.kwargs.patch_size")
    is_convolutional = found is None and re.match(r"vit|deit|beit|eva|swin|cait|xcit", name) is None
    patch = int(kwargs or (found[1] if found else 1))
    if is_convolutional or facts.num_images < _FEW_FOR_A_VIT:
        why = "a convolutional network" if is_convolutional else facts.images
        limit = f"stochastic depth is for ViTs on {_FEW_FOR_A_VIT:,} images and more"
        choices.take("backbone.drop_path_rate", 0.0, f"{why}; {limit}")
    return Network(name, is_convolutional, is_small, patch)


def _for_gpus(choices: Choices, gpus: int) -> str:
    facts = choices.facts
    where = f"{facts.images} and {count(gpus, 'GPU')}"
    if _side(choices) < 2 * 3 * _UNIT:
        name, why = "resnet18", f"images of {_side(choices)} pixels have too few patches of 16 for a ViT"
    elif facts.num_images < _FEW_FOR_A_VIT:
        name, why = (
            "resnet18",
            f"below {_FEW_FOR_A_VIT:,} images a convolutional network learns more than a ViT",
        )
    elif facts.num_images >= LARGE and gpus >= _GPUS_FOR_A_BASE:
        name, why = "vit_base_patch16_224", f"enough of both for a ViT-B: {LARGE:,} and {_GPUS_FOR_A_BASE}"
    else:
        limit = f"a ViT-B is for {LARGE:,} images and {_GPUS_FOR_A_BASE} GPUs"
        name, why = "vit_small_patch16_224", f"DINO's usual network; {limit}"
    choices.take("backbone.name", name, f"{where}; {why}")
    return name


def choose_crops(choices: Choices, network: Network) -> None:
    """Choose number and sides of the crops: not larger than the images, in whole patches."""
    side, unit = _side(choices), network.patch if network.patch > 1 else _UNIT
    usual, why = _usual_size(choices, network)
    least = min(usual, max(_LEAST_SIDE, 2 * unit))
    size = max(least, min(usual, side) // unit * unit)
    smaller = f"images of {side} pixels (shorter side)" if size < usual else why
    size = int(choices.number("crops.global_crop_size", size, smaller))
    num_local = choices.number("crops.num_local_crops", *_local_crops(choices, network, size))
    if num_local:
        local = max(unit, -int(-size * _LOCAL_SHARE // unit) * unit)
        choices.take("crops.local_crop_size", local, f"3/7 of the global crops' {size} pixels, as published")
    else:
        choices.take("crops.global_crop_scale", [0.2, 1.0], "no local crops; global crops show details too")
    if size != _VIT_SIZE:
        sigma = float(f"{2 * size / _VIT_SIZE:.2g}")
        choices.take("crops.blur_sigma", [0.1, sigma], f"2 pixels at {_VIT_SIZE}, in proportion to {size}")


def _local_crops(choices: Choices, network: Network, size: int) -> tuple[int, str]:
    """Return how many local crops beside global crops of `size` pixels, and why."""
    is_asked = any(choices.has(f"crops.local_{name}") for name in ("crop_size", "crop_scale"))
    if (network.is_small or size < _SMALL_SIZE) and not is_asked:
        return 0, f"global crops of {size} pixels; local crops of 3/7 of that show too little"
    return (
        (6, "as in lightly's benchmarks of ResNets")
        if network.is_convolutional
        else (8, "as published for ViTs")
    )


def _usual_size(choices: Choices, network: Network) -> tuple[int, str]:
    if not choices.gpus:
        size = _CPU_SIZE if network.patch == 1 else max(_CPU_SIZE, 6 * network.patch)
        return size, "no GPU; small crops are what CPUs train on in minutes"
    if network.is_convolutional:
        return _RESNET_SIZE, "as in lightly's benchmarks of ResNets"
    return _VIT_SIZE // network.patch * network.patch, "as published for ViTs"


def choose_batch(choices: Choices, network: Network) -> int:
    """Choose batch and train workers: an epoch has four steps at least, and the batch fits the GPUs' memory."""
    facts, gpus = choices.facts, choices.gpus
    usual = _CPU_BATCH if not gpus else _RESNET_BATCH if network.is_convolutional else _VIT_BATCH
    batch, reason = usual, f"{'no GPU' if not gpus else count(gpus, 'GPU')}; usual for {network.name}"
    if (by_images := max(2, _power_of_two(facts.num_images / 4))) < usual:
        batch, reason = (
            by_images,
            f"{facts.images}; at most a quarter of them, so that batches differ",
        )
    asked = choices.given_number("resources.train_workers")
    parts = int(choices.given_number("train.accumulate_steps") or 1)
    workers = int(asked or (_workers(batch, gpus) if gpus else 1))
    each = _images_that_fit(choices, network)
    if each and each * workers * parts < batch:
        batch = each * workers * parts
        reason = f"{count(workers, 'GPU')} of {facts.gpu_bytes / 1e9:.0f} GB; {each * parts} images fit each"
    if batch % (workers * parts):
        batch = max(1, batch // (workers * parts)) * workers * parts
        reason += f"; a multiple of {workers * parts}"
    batch = int(choices.number("train.global_batch_size", batch, reason))
    if gpus and not asked:
        workers = _workers(batch // parts if batch % parts == 0 else batch, gpus)
        used = f"{count(gpus, 'GPU')}, {batch // workers} images of the batch on each"
        fewer = f"{gpus} GPUs, but batch {batch}; {batch // workers} images of it on each of {workers}"
        choices.take("resources.train_workers", workers, used if workers == gpus else fewer)
    return batch


def _workers(batch: int, gpus: int) -> int:
    """Return the most train workers among which a batch divides into shares that are not too small."""
    return max((n for n in range(1, gpus + 1) if batch % n == 0 and batch // n >= _LEAST_SHARE), default=1)


def _images_that_fit(choices: Choices, network: Network) -> int:
    """Return the images that fit a GPU, a power of 2; 0 if that is not known."""
    need = _IMAGE_BYTES.get(network.name)
    if not (choices.gpus and choices.facts.gpu_bytes and need):
        return 0
    return _power_of_two(_USABLE * choices.facts.gpu_bytes / need)


def _side(choices: Choices) -> int:
    """Return the shorter side of the median image; where it is not known, that of a photo."""
    facts = choices.facts
    return min(facts.width, facts.height) or _VIT_SIZE


def _power_of_two(number: float) -> int:
    """Return the largest power of 2 that is at most `number`, at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)
