"""What a model sees: over many pictures and draws, the crops of both kernels are distributed as the reference's.

Unlike in test_fidelity.py nothing is shared but the pictures and the settings: each side draws its own parameters.
"""

from functools import lru_cache

import numpy as np
from crops_oracle import KERNELS, Pixels, oracle_crop, pictures
from test_crop_params import ks_distance

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.augment.params import sample

CONFIG = {"global_crop_size": 96, "local_crop_size": 48, "num_local_crops": 2}
"""Smaller crops than the paper's: the reference takes its time. Every operation is there as it is."""
KINDS = {"global 1": [0], "global 2": [1], "local": [2, 3]}
FEATURES = ("red", "green", "blue", "spread", "detail", "saturation", "black", "white")


def features(crop: Pixels) -> list[float]:
    """What can be said of a crop in a few numbers, in the order of FEATURES."""
    values = crop.astype(np.float32)
    gray = values.mean(axis=-1)
    laplacian = 4 * gray[1:-1, 1:-1] - gray[2:, 1:-1] - gray[:-2, 1:-1] - gray[1:-1, 2:] - gray[1:-1, :-2]
    most = values.max(axis=-1)
    saturation = (most - values.min(axis=-1)) / np.maximum(most, 1)
    clipped = [(crop == 0).mean(), (crop == 255).mean()]
    return [*values.mean(axis=(0, 1)), gray.std(), np.abs(laplacian).mean(), saturation.mean(), *clipped]


def rounds() -> int:
    """How often each picture is taken, for some 1,250 crops of each global kind a draw."""
    return 1250 // len(pictures())


@lru_cache
def reference(seed: int) -> np.ndarray:
    """Features of the reference's crops, float [images, V, features]."""
    return np.array(
        [
            [
                features(oracle_crop(image, crop))
                for crop in sample(
                    crop_rng(seed, epoch, str(n)), image.shape[1], image.shape[0], CropsConfig(**CONFIG)
                ).crops
            ]
            for epoch in range(rounds())
            for n, image in enumerate(pictures())
        ]
    )


def fast(kernel: str, seed: int) -> np.ndarray:
    """Features of a kernel's crops, float [images, V, features]."""
    config = CropsConfig(**CONFIG, kernel=kernel)
    return np.array(
        [
            [
                features(crop)
                for crops in multi_crop(image, crop_rng(seed, epoch, str(n)), config)
                for crop in crops
            ]
            for epoch in range(rounds())
            for n, image in enumerate(pictures())
        ]
    )


@KERNELS
def test_features_of_crops_are_distributed_as_the_references(kernel: str) -> None:
    ours, first, second = fast(kernel, 5), reference(1), reference(2)
    both = np.concatenate([first, second])
    for name, which in KINDS.items():
        for i, feature in enumerate(FEATURES):
            one, other, all_of_them, fast_ones = (
                table[:, which, i].ravel() for table in (first, second, both, ours)
            )
            assert ks_distance(fast_ones, all_of_them) <= ks_distance(one, other) + 0.02, (name, feature)
