"""Features of a frozen backbone. No Ray here.

Images -> clean eval crops -> backbone -> features [n, D]. Used inside a train worker, where each rank embeds its
share, and by the evaluate job, where Ray Data embeds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoray.models.errors import DataError, ResourceError
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.decoding.decode import eval_crop
from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.evaluation.published import Cut, Preprocessing
from dinoray.pipeline.training import distributed
from dinoray.pipeline.training.pixels import pixels
from dinoray.pipeline.training.step import autocast

Part = TypeVar("Part")


class Shares(NamedTuple):
    """Which shares of the images a process embeds, one after the other, and how many there are: one for each rank.

    A process that embeds all of them computes the same batches as the ranks do, and so the same features.
    """

    mine: Sequence[int]
    num_all: int

    @classmethod
    def of_this_rank(cls) -> "Shares":
        """The share of this process among the train workers."""
        return cls((distributed.rank(),), distributed.world_size())

    @classmethod
    def of_all_ranks(cls, num_ranks: int) -> "Shares":
        """All shares of a run of `num_ranks` train workers, for a process that is none of them."""
        return cls(range(num_ranks), num_ranks)

    def gather(self, parts: Sequence[Part]) -> list[Part]:
        """Return what all processes have of their shares, by share; the same on all processes."""
        return [part for of_rank in distributed.gather(list(parts)) for part in of_rank]


_NO_INDICES = np.empty(0, np.int64)


class Features(NamedTuple):
    """Features float32 [n, D], their labels, the number of unreadable images, and the images' indices int64 [n]."""

    features: NDArray[np.float32]
    labels: list[str]
    num_bad: int
    indices: NDArray[np.int64] = _NO_INDICES
    """In their source; empty where they are not known."""

    def only(self, indices: NDArray[np.int64]) -> "Features":
        """Return those of the images at `indices`."""
        rows = np.flatnonzero(np.isin(self.indices, indices))
        labels = [self.labels[row] for row in rows]
        return Features(self.features[rows], labels, self.num_bad, self.indices[rows])


BatchCallback = Callable[[NDArray[np.uint8], Features], None]
"""Callback (uint8 [n, S, S, 3], their features) -> None, called with each batch after it is embedded."""


def eval_batches(
    source: Source,
    indices: Sequence[int],
    *,
    size: int,
    batch_size: int,
    labelled: bool = True,
    cut: Cut | None = None,
) -> Iterator[tuple[NDArray[np.uint8], list[str], int, NDArray[np.int64]]]:
    """Yield batches of (uint8 [n, size, size, 3], labels, number of unreadable images omitted, indices of the others).

    `cut`: the resizing, if not DINO's. A missing label is "". If `labelled`, raises DataError for a readable image
    without a label.
    """

    def prepare(image: NDArray[np.uint8], _: str) -> NDArray[np.uint8]:
        return eval_crop(image, size=size, **cut._asdict() if cut else {})

    rest = iter(indices)
    for batch in load_batches(source, indices, prepare, batch_size=batch_size):
        readable = [index for image, index in zip(batch, rest, strict=False) if image.pixels is not None]
        good = [image for image in batch if image.pixels is not None]
        unlabelled = [image.key for image in good if not (image.label or "").strip()]
        if unlabelled and labelled:
            raise DataError(
                f"{source.config.path}: {unlabelled[0]} has no label, and every evaluated image needs one; give it a "
                "label, or remove it"
            )
        images = [image.pixels for image in good if image.pixels is not None]
        pixels = np.stack(images) if images else np.empty((0, size, size, source.config.channels), np.uint8)
        labels = [image.label or "" for image in good]
        yield pixels, labels, len(batch) - len(good), np.array(readable, np.int64)


Forward = Callable[[nn.Module, Tensor], Tensor]
"""(backbone, float [n, C, S, S]) -> [n, E]."""


@torch.no_grad()
def embed(
    backbone: nn.Module,
    images: NDArray[np.uint8],
    crops: CropsConfig,
    *,
    precision: str,
    forward: Forward | None = None,
) -> NDArray[np.float32]:
    """Map crops uint8 [n, S, S, 3] to float32 [n, D]: the backbone's output in eval mode, or `forward`'s.

    Raises ResourceError if the crops do not fit on the GPU together.
    """
    device = next(backbone.parameters()).device
    if not len(images):
        return np.empty((0, 0), np.float32)
    x = pixels(images[:, None], crops, device)
    try:
        with autocast(precision, device):
            output: Tensor = forward(backbone, x) if forward else backbone(x)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{len(images)} images of {images.shape[1]} px at once do not fit the GPU; "
            "lower eval.batch_size, or --batch-size of `dinoray embed`"
        ) from error
    return output.float().cpu().numpy()


def embed_source(
    backbone: nn.Module,
    source: Source,
    indices: NDArray[np.int64],
    crops: CropsConfig,
    config: EvalConfig,
    *,
    precision: str,
    forward: Forward | None = None,
    labelled: bool = True,
    on_batch: BatchCallback | None = None,
    preprocessing: Preprocessing | None = None,
) -> Features:
    """Return features and labels of the readable images at `indices`; if `labelled`, all need a label.

    `preprocessing`: in place of DINO's and of that of `crops`.
    """
    size = config.image_size or crops.global_crop_size
    cut, crops = (preprocessing.cut(size), preprocessing.normalise(crops)) if preprocessing else (None, crops)
    parts: list[Features] = []
    for images, labels, num_bad, readable in eval_batches(
        source, indices.tolist(), size=size, batch_size=config.batch_size, labelled=labelled, cut=cut
    ):
        rows = embed(backbone, images, crops, precision=precision, forward=forward)
        parts.append(Features(rows, labels, num_bad, readable))
        if on_batch:
            on_batch(images, parts[-1])
    return merge(parts)


def merge(parts: Sequence[Features]) -> Features:
    """Concatenate parts in their order."""
    rows = [p.features for p in parts if len(p.features)]
    features = np.concatenate(rows) if rows else np.empty((0, 0), np.float32)
    labels, num_bad = [x for p in parts for x in p.labels], sum(p.num_bad for p in parts)
    return Features(features, labels, num_bad, np.concatenate([_NO_INDICES, *(p.indices for p in parts)]))


def embed_sharded(
    backbone: nn.Module,
    source: Source,
    crops: CropsConfig,
    config: EvalConfig,
    *,
    limit: int,
    precision: str,
    labelled: bool = True,
    on_batch: Sequence[BatchCallback] | None = None,
    shares: Shares | None = None,
    preprocessing: Preprocessing | None = None,
) -> Features:
    """Run `embed_source` on a `subset`: each process embeds its shares and gets all features.

    `on_batch`: a callback for each of its shares. `shares`: those of this rank unless given.
    """
    indices = subset(source.num_images, limit)
    shares = shares or Shares.of_this_rank()
    parts = [
        embed_source(
            backbone,
            source,
            indices[share :: shares.num_all],
            crops,
            config,
            precision=precision,
            labelled=labelled,
            on_batch=on_batch[place] if on_batch else None,
            preprocessing=preprocessing,
        )
        for place, share in enumerate(shares.mine)
    ]
    return merge(shares.gather(parts))
