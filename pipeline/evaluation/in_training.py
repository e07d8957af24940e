"""Evaluate the teacher during training: k-NN, RankMe, CLID, LiDAR and attention maps. No Ray here."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.backbone_outputs import embed_views
from dinoray.pipeline.evaluation.batch_statistics import calibrated
from dinoray.pipeline.evaluation.clid import MIN_IMAGES, learnability_and_dimension
from dinoray.pipeline.evaluation.config import EvalConfig, ProbeConfig
from dinoray.pipeline.evaluation.features import BatchCallback, Features, Shares, embed_sharded
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.evaluation.probes import lidar, rankme
from dinoray.pipeline.evaluation.published import Preprocessing
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
    shares: Shares | None = None,
    preprocessing: Preprocessing | None = None,
) -> Evaluation | None:
    """Evaluate a backbone and leave it unchanged.

    Call on all ranks: each embeds its share, the first rank scores. Or call in one process that is no rank, with the
    `shares` of all of them: the result is the same. `labelled` is the result of
    `labelled_sources`. Without it, RankMe and CLID are measured on `images`; LiDAR always takes augmented views of
    `images`. `pictures` are a few (key, image) of any size, drawn under `title`; without them nothing is
    drawn. `preprocessing`: in place of the run's. Returns None on other ranks. A backbone whose batch norm has not
    trained is first calibrated on `calibration_images` of `images`.
    """
    crops, precision = algorithm.crops, algorithm.train.precision
    backbone, num_calibration_images = calibrated(backbone, images, algorithm)
    was_training = backbone.training
    backbone.eval()
    limited = [(images, config.max_val_images)] if config.label_free else []
    if labelled is not None:
        limited = [(labelled[0], config.max_train_images), (labelled[1], config.max_val_images)]
    shares = shares or Shares.of_this_rank()
    shown = _Shown(min(limited[-1][0].num_images, limited[-1][1]), shares) if limited and pictures else None
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
            shares=shares,
            preprocessing=preprocessing,
        )
        for number, (source, limit) in enumerate(limited, start=1)
    ]
    embedding = shown.share() if shown else None
    views = (
        _views(backbone, images, crops, config, probe, shares, precision=precision) if config.lidar else None
    )
    result = None
    if distributed.rank() == 0:
        scores = knn_accuracy(sides[0], sides[1], config) if labelled is not None else {}
        if labelled is not None:
            scores["num_val"] = len(sides[1].labels)
        if sides and len(sides[0].features):
            scores["rankme"] = rankme(sides[0].features)
        if sides and len(sides[0].features) >= MIN_IMAGES:
            scores |= learnability_and_dimension(sides[0].features)
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

    def __init__(self, num_images: int, shares: Shares) -> None:
        # Of each share of the images a sample is taken and counted by itself.
        self._shares = shares
        each = -(-num_images // shares.num_all)
        kept = max(1, _NUM_EMBEDDED // shares.num_all)
        self._samples = [_Sample(-(-each // kept)) for _ in shares.mine]

    @property
    def on_batch(self) -> list[BatchCallback]:
        """What keeps some images of a batch, for each share of this process."""
        return [sample.on_batch for sample in self._samples]

    def share(self) -> Embedding | None:
        """Return the samples of all shares; None if there are none."""
        samples = self._shares.gather([sample.rows for sample in self._samples])
        rows = [row for rows in samples for row in rows][:_NUM_EMBEDDED]
        if not rows:
            return None
        features, labels, thumbnails = zip(*rows, strict=True)
        return Embedding(np.stack(features), list(labels), np.stack(thumbnails))


class _Sample:
    """Every `apart`-th image of a share: its features, label and thumbnail."""

    def __init__(self, apart: int) -> None:
        self._apart, self._num_seen = apart, 0
        self.rows: list[tuple[NDArray[np.float32], str, NDArray[np.uint8]]] = []

    def on_batch(self, images: NDArray[np.uint8], features: Features) -> None:
        """Keep some images of a batch."""
        for row in range(-self._num_seen % self._apart, len(images), self._apart):
            small = thumbnail(images[row], width=_THUMBNAIL_SIZE, height=_THUMBNAIL_SIZE)
            self.rows.append((features.features[row], features.labels[row], np.asarray(small)))
        self._num_seen += len(images)


def _views(
    backbone: nn.Module,
    images: Source,
    crops: CropsConfig,
    config: EvalConfig,
    probe: ProbeConfig,
    shares: Shares,
    *,
    precision: str,
) -> NDArray[np.float32]:
    """Embed augmented views of a fixed random subset: each process embeds its shares and gets all."""
    chosen = subset(images.num_images, probe.lidar_images)
    mine = [
        embed_views(
            backbone,
            images,
            chosen[share :: shares.num_all].tolist(),
            crops,
            num_views=probe.lidar_views,
            seed=probe.seed,
            batch_size=config.batch_size,
            precision=precision,
        )
        for share in shares.mine
    ]
    parts = [rows for rows in shares.gather(mine) if len(rows)]
    return np.concatenate(parts) if parts else mine[0]
