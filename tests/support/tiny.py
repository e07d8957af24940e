"""The smallest run that is a whole run: a two-block ViT on 16 px crops, some milliseconds a step."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.augment.params import photometric_columns, sample
from dinoray.pipeline.training.config import DINOConfig

NUM_IMAGES = 40
"""Length of an epoch: ten steps of `tiny_config`."""

TINY_RESNET: dict[str, Any] = {"name": "resnet10t", "kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}}
"""The `backbone` section of a network with batch norm."""

Batch = dict[str, NDArray[Any]]


def tiny_config(**changes: dict[str, Any]) -> DINOConfig:
    """Two global crops of 16 px and two local ones of 8, K = 32, batch 4; `changes` by section."""
    tree: dict[str, dict[str, Any]] = {
        "crops": {"num_local_crops": 2, "global_crop_size": 16, "local_crop_size": 8},
        "backbone": {
            "name": "vit_tiny_patch16_224",
            "drop_path_rate": 0.0,
            "kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "head": {"out_dim": 32, "hidden_dim": 256, "bottleneck_dim": 16},
        "optim": {"base_lr": 0.064, "warmup_epochs": 0, "freeze_last_layer_epochs": 0},  # a peak of 1e-3
        "train": {"epochs": 2, "global_batch_size": 4},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return DINOConfig.model_validate(tree)


def tiny_batch(config: DINOConfig, *, num_images: int = 4, seed: int = 0) -> Batch:
    """Columns of a batch as the data stream delivers them: noise, another for each seed."""
    rng, crops = np.random.default_rng(seed), config.crops

    def noise(num_crops: int, size: int) -> NDArray[np.uint8]:
        return rng.integers(0, 256, (num_images, num_crops, size, size, 3), dtype=np.uint8)

    later: Batch = {}
    if crops.photometric == "device":
        drawn = [sample(np.random.default_rng([seed, n]), 40, 30, crops) for n in range(num_images)]
        later = photometric_columns(np.stack([params.split_photometric()[1] for params in drawn]), crops)
    return {
        "global_crops": noise(crops.num_global_crops, crops.global_crop_size),
        "local_crops": noise(crops.num_local_crops, crops.local_crop_size),
        "position": np.arange(num_images) + num_images * seed,
        "status": np.zeros(num_images, np.int8),
        "note": np.full(num_images, "", dtype=object),
        **later,
    }
