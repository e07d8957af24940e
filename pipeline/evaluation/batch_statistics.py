"""Batch-norm statistics of an untrained network, so that it can be evaluated. No Ray here.

A new network has running means of 0 and variances of 1, which fit no data. An evaluation would measure this
mismatch and not the features. Calibration passes global crops of training images through the backbone and
learns nothing.
"""

import copy
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.backbone_outputs import view_crops
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.training import distributed
from dinoray.pipeline.training.config import DINOConfig

_NUM_IMAGES = 512
"""Number of training images for calibration; at least one batch is used."""


def calibrated(backbone: nn.Module, images: Source, config: DINOConfig) -> tuple[nn.Module, int]:
    """Return a copy of the backbone calibrated on training images, and the number of images used.

    Batches equal the teacher's batches in training: all global crops of as many images, over all processes.
    Layers with trained statistics keep them. Without layers to calibrate, the result is the backbone itself,
    and 0. Call on all processes.
    """
    if not _untrained(backbone):
        return backbone, 0
    backbone = copy.deepcopy(backbone).eval()
    for layer in _untrained(backbone):
        layer.reset_running_stats()
        layer.momentum = None  # use the mean over all batches
        layer.train()
    mine, batch_size = _share(images.num_images, config)
    crops, num_views = config.crops, config.crops.num_global_crops
    prepare = partial(view_crops, crops=crops, num_views=num_views, seed=config.train.seed)
    device, num_used = next(backbone.parameters()).device, 0
    for batch in load_batches(images, mine.tolist(), prepare, batch_size=batch_size):
        views = [image.pixels for image in batch if image.pixels is not None]
        counts = torch.tensor([len(views), not views], device=device)
        num_views_of_all, num_without = distributed.all_reduce_sum(counts).tolist()
        # All processes pass a batch or none does: each would wait for the statistics of the others.
        if not num_without and num_views_of_all * num_views > 1:
            embed(backbone, np.concatenate(views), crops, precision=config.train.precision)
            num_used += num_views_of_all
    return backbone.eval(), num_used


def _untrained(backbone: nn.Module) -> list[_BatchNorm]:
    """Return the layers whose running statistics still have their initial values."""
    layers = [layer for layer in backbone.modules() if isinstance(layer, _BatchNorm)]
    return [
        layer
        for layer in layers
        if layer.running_mean is not None
        and layer.running_var is not None
        and not layer.running_mean.any()
        and bool((layer.running_var == 1).all())
    ]


def _share(num_images: int, config: DINOConfig) -> tuple[NDArray[np.int64], int]:
    """Return this process's images, batch after batch, and the number of images per batch.

    Each batch is spread over the whole data set, because neighbouring images are often of one class.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    batch_size = config.train.global_batch_size // config.train.accumulate_steps
    num_batches = max(1, min(num_images, _NUM_IMAGES) // batch_size)
    indices = subset(num_images, num_batches * batch_size)
    indices = np.resize(indices, max(len(indices), world_size))
    shares = [indices[first::num_batches][rank::world_size] for first in range(num_batches)]
    return np.concatenate(shares), len(shares[0])
