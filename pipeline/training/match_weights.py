"""Set the position embeddings of a config to match the weights that it starts from."""

import math

from dinoray.models.backbone import is_plain_vit
from dinoray.models.published.checkpoint import Weights
from dinoray.pipeline.training.config import DINOConfig


def adapt(config: DINOConfig, weights: Weights) -> DINOConfig:
    """Return `config` for networks that start from `weights`.

    Published ViTs keep their grid and its way of resizing. A backbone that is no plain ViT stays unchanged; a
    misfit of its weights is detected when they are loaded.
    """
    pos_embed = weights.teacher.get("backbone.pos_embed")
    patches = weights.teacher.get("backbone.patch_embed.proj.weight")
    if not weights.official or pos_embed is None or patches is None or not is_plain_vit(config.backbone.name):
        return config
    side = math.isqrt(pos_embed.shape[1])
    if side**2 != pos_embed.shape[1]:  # with a class token
        side = math.isqrt(pos_embed.shape[1] - 1)
    tree = config.model_dump()
    tree["backbone"]["pos_embed"] = "official"
    tree["backbone"]["kwargs"] = {"img_size": side * patches.shape[-1], **tree["backbone"]["kwargs"]}
    return DINOConfig.model_validate(tree)
