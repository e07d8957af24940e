"""Good weights of a tiny network: they tell the classes of images apart, which training on can make worse."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinoray.models.backbone import embed_dim
from dinoray.pipeline.data.decoding.decode import eval_crop
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.pixels import pixels
from dinoray.pipeline.training.state import build_state


def fitted_weights(
    config: DINOConfig, images: Sequence[NDArray[np.uint8]], labels: Sequence[str]
) -> dict[str, Tensor]:
    """Return the state dict of the config's backbone after 60 steps with the labels of all images."""
    classes = sorted(set(labels))
    truth = torch.tensor([classes.index(label) for label in labels])
    crops = np.stack([eval_crop(image, size=config.crops.global_crop_size) for image in images])
    x = pixels(crops[:, None], config.crops, torch.device("cpu"))
    backbone = build_state(config, num_images=len(images)).dino.student.backbone
    classifier = torch.nn.Linear(embed_dim(backbone), len(classes))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *classifier.parameters()], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(classifier(backbone(x)), truth).backward()
        optimizer.step()
    return backbone.state_dict()
