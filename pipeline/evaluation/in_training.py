"""Evaluate the teacher during training: k-NN, RankMe, LiDAR and attention maps. No Ray here."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.source import Source
from dinoray.pipeline.evaluation.backbone_outputs import embed_views
from dinoray.pipeline.evaluation.batch_statistics import calibrated
from dinoray.pipeline.evaluation.config import EvalConfig, ProbeConfig
from dinoray.pipeline.evaluation.features import Features, embed_sharded
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.evaluation.probes import lidar, rankme
from dinoray.pipeline.figures.attention_sheet import attention_figure
from dinoray.pipeline.figures.drawing import thumbnail
from dinoray.pipeline.tracking.sink import Embedding
from dinoray.pipeline.training import distributed
from dinoray.pipeline.training.config import DINOConfig

_NUM_EMBEDDED = 500
"""Maximum number of images in an `Embedding`."""
_THUMBNAIL_SIZE = 32


class Evaluation(NamedTuple):
    """Scores by name and two pictures, which are None if not requested.

    `attention` is PNG; it is also None for networks without class-token attention.
    """

    scores: dict[str, float]
    attention: bytes | None
    embedding: Embedding | None


def evaluate(
    backbone: nn.Module,
    labelled: tuple[Source, Source] | None,
    images: Source,
    pictures: Sequence[tuple[str, NDArray[np.uint8]]],
    *,
    title: str,
    algorithm: DINOConfig,
    config: EvalConfig,
    probe: ProbeConfig,
) -> Evaluation | None:
    """Evaluate a backbone and leave it unchanged.

    Call on all ranks: each embeds its share, the first rank scores. `labelled` is the result of
    `labelled_sources`. Without it, RankMe is measured on `images`; LiDAR always takes augmented views of
    `images`. `pictures` are a few (key, image) of any size, drawn under `title`; without them nothing is
    drawn. Returns None on other ranks. A backbone whose batch norm has not trained is first calibrated on
    `calibration_images` of `images`.
    """
    crops, precision = algorithm.crops, algorithm.train.precision
    backbone, num_calibration_images = calibrated(backbone, images, algorithm)
    was_training = backbone.training
    backbone.eval()
    limited = [(images, config.max_val_images)] if config.label_free else []
    if labelled is not None:
        limited = [(labelled[0], config.max_train_images), (labelled[1], config.max_val_images)]
    shown = _Shown(min(limited[-1][0].num_images, limited[-1][1])) if limited and pictures else None
    sides = [
        embed_sharded(
            backbone,
            source,
            crops,
            config,
            limit=limit,
            precision=precision,
            labelled=labelled is not None,
            on_batch=shown.on_batch if shown and number == len(limited) else None,
        )
        for number, (source, limit) in enumerate(limited, start=1)
    ]
    embedding = shown.share() if shown else None
    views = _views(backbone, images, crops, config, probe, precision=precision) if config.lidar else None
    result = None
    if distributed.rank() == 0:
        scores = knn_accuracy(sides[0], sides[1], config) if labelled is not None else {}
        if sides and len(sides[0].features):
            scores["rankme"] = rankme(sides[0].features)
        if views is not None and len(views) > 1:
            scores["lidar"] = lidar(views)
        if num_calibration_images and scores:
            scores["calibration_images"] = num_calibration_images
        figure = attention_figure(backbone, pictures, crops, title=title)
        result = Evaluation(scores, figure, embedding)
    backbone.train(was_training)
    return result


class _Shown:
    """Evenly spaced sample, at most `_NUM_EMBEDDED`, of the `num_images` images that all ranks embed."""

    def __init__(self, num_images: int) -> None:
        # Each rank samples its share of the images and counts by itself.
        mine = -(-num_images // distributed.world_size())
        kept = max(1, _NUM_EMBEDDED // distributed.world_size())
        self._apart, self._num_seen = -(-mine // kept), 0
        self._rows: list[tuple[NDArray[np.float32], str, NDArray[np.uint8]]] = []

    def on_batch(self, images: NDArray[np.uint8], features: Features) -> None:
        """Keep some images of a batch."""
        for row in range(-self._num_seen % self._apart, len(images), self._apart):
            small = thumbnail(images[row], width=_THUMBNAIL_SIZE, height=_THUMBNAIL_SIZE)
            self._rows.append((features.features[row], features.labels[row], np.asarray(small)))
        self._num_seen += len(images)

    def share(self) -> Embedding | None:
        """Return the samples of all ranks; None if there are none."""
        rows = [row for rows in distributed.gather(self._rows) for row in rows][:_NUM_EMBEDDED]
        if not rows:
            return None
        features, labels, thumbnails = zip(*rows, strict=True)
        return Embedding(np.stack(features), list(labels), np.stack(thumbnails))


def _views(
    backbone: nn.Module,
    images: Source,
    crops: CropsConfig,
    config: EvalConfig,
    probe: ProbeConfig,
    *,
    precision: str,
) -> NDArray[np.float32]:
    """Embed augmented views of a fixed random subset: each rank embeds its share and gets all."""
    mine = subset(images.num_images, probe.lidar_images)[distributed.rank() :: distributed.world_size()]
    part = embed_views(
        backbone,
        images,
        mine.tolist(),
        crops,
        num_views=probe.lidar_views,
        seed=probe.seed,
        batch_size=config.batch_size,
        precision=precision,
    )
    parts = [rows for rows in distributed.gather(part) if len(rows)]
    return np.concatenate(parts) if parts else part
