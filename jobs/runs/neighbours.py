"""The page about neighbours of a run: features before and after on actors, then pictures of the chosen queries."""

import io
from functools import partial
from typing import NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from PIL import Image

from dinoray.jobs.runs.open_checkpoint import Opened
from dinoray.jobs.runs.replay_start import begin
from dinoray.models.errors import DataError, DinorayError, redact_credentials
from dinoray.pipeline.data.decoding.decode import eval_crop
from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.actors import EmbedTask, embed_on_actors
from dinoray.pipeline.evaluation.features import Features, embed_source, merge
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.evaluation.neighbours import (
    Change,
    Nearest,
    change,
    chosen_queries,
    nearest,
    same_label,
)
from dinoray.pipeline.reporting.neighbours_page import (
    SIDE,
    Counts,
    Neighbour,
    NeighboursPage,
    Picture,
    Query,
    build_neighbours_page,
)
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.checkpoint_files import read_meta
from dinoray.pipeline.training.checkpoint import FrozenBackbone, Which
from dinoray.pipeline.worker.config import Config

_MOST_QUERIES, _EACH = 1000, 10
"""Queries that are compared, and how many of them a section of the page shows."""

Sides = tuple[Features, Features]
"""Queries and bank."""


class Where(NamedTuple):
    """The actors that embed."""

    actors: int
    use_gpu: bool


class Images(NamedTuple):
    """Where queries and their neighbours come from."""

    queries: Source
    bank: Source
    max_bank: int

    @property
    def is_same(self) -> bool:
        """True without labels: neighbours are sought among the images that queries are of."""
        return self.queries is self.bank


class Found(NamedTuple):
    """Queries and bank of the network, and neighbours under its features and, if known, under those of the start."""

    sides: Sides
    before: Nearest | None
    after: Nearest


def write_neighbours(opened: Opened, config: Config, images: Images, *, which: Which, where: Where) -> str:
    """Embed with the network and with the start's weights, compare, write the page; return its address."""
    start, why = _start(opened, config, which)
    sides = _embedded(opened.network, config, images, where)
    earlier = None if start is None else _embedded(start, config, images, where)
    if earlier is not None:  # an image may be unreadable for a moment
        earlier, sides = _in_both(earlier, sides), _in_both(sides, earlier)
    if not len(sides[0].indices) or len(sides[1].indices) <= images.is_same:
        raise DataError(
            f"{images.bank.config.path} has no two readable images to compare; set data.path to readable images"
        )
    before = None if earlier is None else nearest(*earlier, is_same=images.is_same)
    found = Found(sides, before, nearest(*sides, is_same=images.is_same))
    changed = None
    if earlier is not None and before is not None:
        changed = change(earlier, before, found.after, is_same=images.is_same)
    chosen = chosen_queries(changed, len(sides[0].indices), each=_EACH)
    shown = _Pictures(images, found, np.concatenate(chosen))
    folder = opened.found.run or opened.found.folder
    page = NeighboursPage(
        title=f"Nearest neighbours: {which} at step {opened.step:,}",
        address=folder.uri,
        about=[_origin(config, which) if start else "", _images_line(images)],
        warnings=[why] if why else [],
        counts=_counts(found, changed),
        sample=[shown.query(number) for number in chosen[0].tolist()],
        changed=[shown.query(number) for number in chosen[1].tolist()],
    )
    folder.write(run_dir.NEIGHBOURS, build_neighbours_page(page).encode())
    return folder.join(run_dir.NEIGHBOURS)


def _start(opened: Opened, config: Config, which: Which) -> tuple[FrozenBackbone | None, str]:
    """Return the network that the run began with; None, and why, where it cannot be had."""
    run, address = opened.found.run, opened.found.folder.uri
    if run is None:
        return None, f"{address} lies outside its run, so the weights that it began with are not known."
    try:
        num_images = read_meta(opened.found.folder)["num_images"]
        state = begin(run, config, torch.device("cpu"), num_images=num_images)
    except DinorayError as error:
        return None, f"The weights that the run began with cannot be loaded, so nothing is compared: {error}"
    backbone = getattr(state.dino, which).backbone
    return FrozenBackbone(state.config, backbone.state_dict()), ""


def _origin(config: Config, which: Which) -> str:
    if config.init.path is not None:
        weights = f"the weights of {redact_credentials(config.init.path)}"
    elif config.backbone.pretrained:
        weights = f"timm's published weights of {config.backbone.name}"
    else:
        weights = f"random weights, seed {config.train.seed}"
    return f"Before: the {which} as the run began, {weights}."


def _images_line(images: Images) -> str:
    if images.is_same:
        return f"Queries and neighbours are images of {images.bank.config.path}."
    return f"Queries are images of {images.queries.config.path} that k-NN classifies; neighbours are those that vote."


def _embedded(network: FrozenBackbone, config: Config, images: Images, where: Where) -> Sides:
    """Return features of queries and bank; of one source they are embedded once."""
    work = partial(
        embed_source,
        crops=network.config.crops,
        config=config.eval,
        precision=config.train.precision,
        labelled=False,
    )
    size = config.eval.batch_size
    bank = subset(images.bank.num_images, images.max_bank)
    queries = subset(images.queries.num_images, _MOST_QUERIES)
    wanted = [(images.bank, bank)] if images.is_same else [(images.queries, queries), (images.bank, bank)]
    tasks = [
        EmbedTask(work, source, [indices[start : start + size] for start in range(0, len(indices), size)])
        for source, indices in wanted
    ]
    parts: list[list[Features]] = [[] for _ in tasks]
    embedded = embed_on_actors(ray.put(network), tasks, actors=where.actors, use_gpu=where.use_gpu)
    for number, part in embedded:
        parts[number].append(part)
    *others, all_of_bank = (merge(of_task) for of_task in parts)
    if others:
        return others[0], all_of_bank
    return all_of_bank.only(all_of_bank.indices[subset(len(all_of_bank.indices), _MOST_QUERIES)]), all_of_bank


def _in_both(one: Sides, other: Sides) -> Sides:
    return one[0].only(other[0].indices), one[1].only(other[1].indices)


def _counts(found: Found, changed: Change | None) -> Counts:
    queries, bank = found.sides
    after = same_label(queries, bank, found.after)
    before = None if found.before is None else same_label(queries, bank, found.before)
    gained = 0 if before is None or after is None else after.sum(1) - before.sum(1)
    return Counts(
        num_queries=len(queries.indices),
        num_bank=len(bank.indices),
        new_share=None if changed is None else float(changed.num_new.sum() / found.after.rows.size),
        right_before=None if before is None else float(before.mean()),
        right_after=None if after is None else float(after.mean()),
        num_better=int(np.sum(gained > 0)),
        num_worse=int(np.sum(gained < 0)),
    )


class _Pictures:
    """The pictures of chosen queries and their neighbours, each read once more, and the rows that they make."""

    def __init__(self, images: Images, found: Found, numbers: NDArray[np.int64]) -> None:
        self._found = found
        queries, bank = found.sides
        rows = [near.rows[numbers] for near in (found.before, found.after) if near is not None]
        self._queries = _read(images.queries, queries.indices[numbers])
        self._bank = _read(images.bank, np.unique(bank.indices[np.stack(rows)]))

    def query(self, number: int) -> Query:
        """Return a query with its neighbours."""
        found = self._found
        known = set() if found.before is None else set(found.before.rows[number].tolist())

        def strip(near: Nearest | None, *, is_after: bool) -> list[Neighbour]:
            rows, cosines = (
                ([], []) if near is None else (near.rows[number].tolist(), near.cosines[number].tolist())
            )
            return [
                Neighbour(
                    self._bank[int(found.sides[1].indices[row])],
                    cosine,
                    is_after and found.before is not None and row not in known,
                )
                for row, cosine in zip(rows, cosines, strict=True)
            ]

        picture = self._queries[int(found.sides[0].indices[number])]
        return Query(picture, strip(found.before, is_after=False), strip(found.after, is_after=True))


def _read(source: Source, indices: NDArray[np.int64]) -> dict[int, Picture]:
    """Return the images at `indices` as small JPEGs of what evaluations see of them."""
    numbers, pictures = indices.tolist(), []
    for batch in load_batches(source, numbers, lambda image, _: eval_crop(image, size=SIDE), batch_size=64):
        for image in batch:
            jpeg = io.BytesIO()
            if image.pixels is not None:
                Image.fromarray(image.pixels).save(jpeg, "JPEG", quality=82)
            pictures.append(Picture(image.key, (image.label or "").strip(), jpeg.getvalue()))
    return dict(zip(numbers, pictures, strict=True))
