"""Frozen-teacher features, and the weighted k-NN accuracy on them. No Ray here.

Labelled images -> clean eval crops -> backbone -> features [n, D] -> k-NN. Used inside a training worker (each
rank embeds its share) and by the evaluate job (Ray Data embeds).
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from models.settings import ConfigError, DataError, Settings
from pipeline.crops import CropsConfig
from pipeline.decode import BadImage, decode, eval_crop
from pipeline.manifest import DataConfig, build_manifest, load_or_build
from pipeline.order import permute
from pipeline.source import Source, Status
from pipeline.storage import Directory, normal_uri
from pipeline.training import autocast, pixels


class EvalConfig(Settings):
    """k-NN accuracy of the teacher on labelled images, during the run and at its end."""

    val_path: str | None = None
    """Labelled images that are classified; same kinds and columns as `data.path`. None: no evaluation."""
    train_path: str | None = None
    """Labelled images that vote; None takes `data.path`."""
    every_steps: int = Field(default=1000, ge=1)
    """Steps between evaluations; there is one before the first step and one at the end as well."""
    k: tuple[PositiveInt, ...] = Field(default=(10, 20), min_length=1)
    """Numbers of neighbours that vote; one accuracy each."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the votes exp(cosine / temperature)."""
    batch_size: int = Field(default=256, ge=1)
    """Images per forward."""
    max_train_images: int = Field(default=50_000, ge=1)
    """Voters are a fixed random subset of at most this size."""
    max_val_images: int = Field(default=10_000, ge=1)
    """Classified images likewise."""
    image_size: int | None = Field(default=None, ge=8)
    """Side of the centre crop in pixels; None takes the global crop size."""

    @field_validator("val_path", "train_path")
    @classmethod
    def _path_is_an_address(cls, path: str | None) -> str | None:
        if path is not None:
            normal_uri(path)
        return path


class Features(NamedTuple):
    """`features` float32 [n, D], their labels, and how many images could not be read."""

    features: NDArray[np.float32]
    labels: list[str]
    num_bad: int


def labelled_sources(
    data: DataConfig, config: EvalConfig, run: Directory | None = None
) -> tuple[Source, Source] | None:
    """Sources of voters and of classified images, read like `data`; None without `eval.val_path`.

    Their manifests are kept in the run directory, if one is given. ConfigError when nothing says where labels are.
    """
    if config.val_path is None:
        return None
    if data.label_column is None and not data.label_from_parent:
        raise ConfigError(
            "eval.val_path needs labels: set data.label_column (Parquet) or data.label_from_parent=true "
            "(one folder per class), or unset eval.val_path"
        )

    def source(path: str, name: str) -> Source:
        at = DataConfig.model_validate(data.model_dump() | {"path": path})
        return Source(at, load_or_build(at, run, name) if run else build_manifest(at))

    return (
        source(config.train_path or data.path, "manifest_eval_train.parquet"),
        source(config.val_path, "manifest_eval_val.parquet"),
    )


def labelled_crops(
    source: Source, indices: Sequence[int], *, size: int, batch_size: int
) -> Iterator[tuple[NDArray[np.uint8], list[str], int]]:
    """Batches of (uint8 [n, size, size, 3], labels, number of unreadable images left out)."""

    def load(fetched: tuple) -> NDArray[np.uint8] | None:
        data = fetched[1]
        try:
            return (
                None
                if data is None
                else eval_crop(decode(data, max_pixels=source.config.max_pixels), size=size)
            )
        except BadImage:
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(indices), batch_size):
            fetched = source.fetch(indices[start : start + batch_size])
            unlabelled = [f.key for f in fetched if f.label is None and f.status == Status.OK]
            if unlabelled:
                raise DataError(
                    f"{source.config.path}: {unlabelled[0]} has no label; every evaluated image needs one"
                )
            crops = list(pool.map(load, fetched))
            good = [(crop, str(f.label)) for crop, f in zip(crops, fetched, strict=True) if crop is not None]
            images = np.stack([crop for crop, _ in good]) if good else np.empty((0, size, size, 3), np.uint8)
            yield images, [label for _, label in good], len(crops) - len(good)


@torch.no_grad()
def embed(
    backbone: nn.Module, images: NDArray[np.uint8], crops: CropsConfig, *, precision: str
) -> NDArray[np.float32]:
    """Eval crops uint8 [n, S, S, 3] -> features float32 [n, D] of a backbone in eval mode."""
    device = next(backbone.parameters()).device
    if not len(images):
        return np.empty((0, 0), np.float32)
    x = pixels(images[:, None], crops, device)
    with autocast(precision, device):
        return backbone(x).float().cpu().numpy()


def subset(num_images: int, limit: int) -> NDArray[np.int64]:
    """A fixed random subset of at most `limit` image indices, ascending: the same for every run and rank."""
    if num_images <= limit:
        return np.arange(num_images)
    return np.sort(permute(np.arange(limit), size=num_images, seed=0))


def embed_source(
    backbone: nn.Module,
    source: Source,
    indices: NDArray[np.int64],
    crops: CropsConfig,
    config: EvalConfig,
    *,
    precision: str,
) -> Features:
    """Features and labels of the images at `indices` of a labelled source."""
    size = config.image_size or crops.global_crop_size
    rows: list[NDArray[np.float32]] = []
    labels: list[str] = []
    num_bad = 0
    for images, names, bad in labelled_crops(
        source, indices.tolist(), size=size, batch_size=config.batch_size
    ):
        rows.append(embed(backbone, images, crops, precision=precision))
        labels += names
        num_bad += bad
    return merge([Features(r, [], 0) for r in rows])._replace(labels=labels, num_bad=num_bad)


def merge(parts: Sequence[Features]) -> Features:
    """Parts in their order, as one."""
    rows = [p.features for p in parts if len(p.features)]
    features = np.concatenate(rows) if rows else np.empty((0, 0), np.float32)
    return Features(features, [x for p in parts for x in p.labels], sum(p.num_bad for p in parts))


def embed_sharded(
    backbone: nn.Module, source: Source, crops: CropsConfig, config: EvalConfig, *, limit: int, precision: str
) -> Features:
    """Like `embed_source` on a `subset`, each rank of the process group embedding its share; all get the whole."""
    indices = subset(source.num_images, limit)
    if not (dist.is_available() and dist.is_initialized()):
        return embed_source(backbone, source, indices, crops, config, precision=precision)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = embed_source(backbone, source, indices[rank::world_size], crops, config, precision=precision)
    parts: list[Features | None] = [None] * world_size
    dist.all_gather_object(parts, mine)
    return merge([p for p in parts if p is not None])


def knn_classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Weighted k-NN: [n, D] bank with int labels [n], [m, D] queries -> predicted labels [m].

    Cosine similarity; each of the k nearest votes for its label with exp(similarity / temperature). A k beyond
    the bank's size means all of it.
    """
    bank, queries = F.normalize(bank.float(), dim=-1), F.normalize(queries.float(), dim=-1)
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=-1)
    votes = torch.zeros(len(queries), num_classes, device=bank.device)
    # Relative to the nearest: the same votes but for a factor, and no overflow at small temperatures.
    votes.scatter_add_(1, bank_labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
    return votes.argmax(dim=-1)


def knn_accuracy(train: Features, val: Features, config: EvalConfig) -> dict[str, float]:
    """Top-1 accuracy per k (`knn_10`, ...) in [0, 1], beside `majority`: always guessing the commonest voter label.

    A class that only the val set has counts as wrong. Raises DataError when a side has no readable image.
    """
    for side, features in (("eval.train_path", train), ("eval.val_path", val)):
        if not features.labels:
            raise DataError(f"{side} has no readable labelled image ({features.num_bad} unreadable)")
    names = {name: i for i, name in enumerate(dict.fromkeys(train.labels + val.labels))}
    bank, bank_labels = torch.from_numpy(train.features), torch.tensor([names[x] for x in train.labels])
    queries, truth = torch.from_numpy(val.features), torch.tensor([names[x] for x in val.labels])
    scores: dict[str, float] = {}
    for k in config.k:
        hits = 0
        for start in range(0, len(queries), 1024):
            part = slice(start, start + 1024)
            guess = knn_classify(
                bank, bank_labels, queries[part], k=k, temperature=config.temperature, num_classes=len(names)
            )
            hits += int((guess == truth[part]).sum())
        scores[f"knn_{k}"] = hits / len(queries)
    commonest = Counter(train.labels).most_common(1)[0][0]
    scores["majority"] = val.labels.count(commonest) / len(val.labels)
    return scores
