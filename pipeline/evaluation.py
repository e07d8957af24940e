"""What is looked at in the middle of a run: k-NN accuracy and RankMe of the teacher, and its attention. No Ray here."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline import processes
from pipeline.attention_figure import attention_figure
from pipeline.crops_config import CropsConfig
from pipeline.features import EvalConfig, embed_sharded, knn_accuracy
from pipeline.probes import rankme
from pipeline.source import Source


class Evaluation(NamedTuple):
    """`scores` by name, none without labelled images; `attention` as PNG, None for networks without."""

    scores: dict[str, float]
    attention: bytes | None


def evaluate(
    backbone: nn.Module,
    sources: tuple[Source, Source] | None,
    pictures: Sequence[tuple[str, NDArray[np.uint8]]],
    *,
    title: str,
    crops: CropsConfig,
    config: EvalConfig,
    precision: str,
) -> Evaluation | None:
    """Evaluate a backbone, which is left in its mode. Call on all ranks: each embeds its share, the first one scores.

    `sources` are those of `labelled_sources`, `pictures` a handful of (key, image) of any size,
    drawn under `title`. None on other ranks.
    """
    was_training = backbone.training
    backbone.eval()
    limits = (config.max_train_images, config.max_val_images)
    sides = [
        embed_sharded(backbone, source, crops, config, limit=limit, precision=precision)
        for source, limit in zip(sources or (), limits, strict=False)
    ]
    result = None
    if processes.rank() == 0:
        scores = {}
        if sides:
            scores = knn_accuracy(sides[0], sides[1], config) | {"rankme": rankme(sides[0].features)}
        result = Evaluation(scores, attention_figure(backbone, pictures, crops, title=title))
    backbone.train(was_training)
    return result
