"""Draw the parameters of every crop of one image from a random generator.

This module stands between config.py and multicrop.py, which applies the parameters to pixels. Sampling uses
the width and height of an image and a generator, never a pixel. So millions of draws can test the
distributions, and every implementation, including the slow one in the tests, gets the same parameters. There
are no files and no Ray here.
"""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.augment.config import NUM_PHOTOMETRIC, CropsConfig, crop_kinds
from dinoray.pipeline.augment.jit import MISSING, compiled, njit_cached
from dinoray.pipeline.augment.later_draws import (
    NUM_COLUMNS,
    NUM_STAINS,
    QUARTER_TURN,
    STAINS,
    VERTICAL_FLIP,
    draw_later,
)
from dinoray.pipeline.augment.rng import crop_rng, fill_uniform, image_digest

Table = npt.NDArray[np.float64]
Photometric = npt.NDArray[np.float32]

# Columns of CropParams.table; those of later_draws.py follow.
TOP, LEFT, HEIGHT, WIDTH, FLIP, OPERATIONS, FACTORS, GRAY, SIGMA, SOLARIZE, SIZE = (
    0, 1, 2, 3, 4, 5, 9, 13, 14, 15, 16
)  # fmt: skip

NUM_OPERATIONS = 4
_UNCHANGED = (0.0,) * (NUM_PHOTOMETRIC - 2) + (-1.0, 256.0)
"""The columns from OPERATIONS to SOLARIZE of a crop whose pixel values stay as they are."""
_NAMES = ("", "brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = 1, 2, 3, 4
_ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))

_TRIES = 10
# Each crop owns a fixed row of uniform numbers and need not use them all. So a changed probability, strength
# or number of crops leaves every other draw unchanged.
_NUM_UNIFORMS = 2 * _TRIES + 13


class OneCrop(NamedTuple):
    """All parameters of one crop. The box is in pixels of the image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    """(operation, factor) in the order of application; empty for an unjittered crop."""
    gray: bool
    blur_sigma: float | None
    solarize: int | None
    """The level from which values are inverted, or None."""
    size: int
    """Side of the finished crop."""
    vertical_flip: bool = False
    quarter_turn: bool = False
    """Turned by 90 degrees against the clock, after the flips."""
    stains: tuple[float, ...] | None = None
    """Factors of the amounts of hematoxylin, eosin and DAB, then shifts of these; applied before the jitter."""


class CropParams(NamedTuple):
    """All parameters of the crops of one `width` x `height` image.

    Use `crops` for reading; kernels use `table`. It is float64 [V, 25] with box, flip, four operations (0 is
    none) and their factors, gray, sigma (-1 is none), level of solarization (256 is none), size, vertical flip,
    quarter turn, three factors of stains (0 is none) and three shifts.
    """

    width: int
    height: int
    table: Table
    config: CropsConfig

    @property
    def crops(self) -> tuple[OneCrop, ...]:
        """Return one entry per crop, in the order of `crop_kinds`."""
        return tuple(_one_crop(row) for row in self.table.tolist())

    def split_photometric(self) -> tuple["CropParams", Photometric]:
        """Return the same regions and flips without changes of pixel values, and these changes.

        They are float32 [V, 11], for `crops.photometric=device`: four operations and their factors, gray, sigma and
        level of solarization as in `table`, but the hue's factor in 256ths of a turn, as all kernels turn it.
        """
        table = self.table.copy()
        table[:, OPERATIONS:SIZE] = _UNCHANGED
        changes = self.table[:, OPERATIONS:SIZE].astype(np.float32)
        operations, factors = changes[:, :NUM_OPERATIONS], changes[:, NUM_OPERATIONS : 2 * NUM_OPERATIONS]
        turns = (self.table[:, FACTORS : FACTORS + NUM_OPERATIONS] * 255).astype(np.int64) % 256
        np.copyto(factors, turns, where=operations == HUE)
        return self._replace(table=table), changes

    def with_crops(self, crops: list[OneCrop]) -> "CropParams":
        """Return the same image with other crops: the inverse of `crops`, for parameters not drawn."""
        return self._replace(table=np.array([_row(crop) for crop in crops], np.float64))


def photometric_columns(changes: Photometric, config: CropsConfig) -> dict[str, Photometric]:
    """Return the columns of a block for the changes of `split_photometric` of its images, [n, V, 11]."""
    groups = np.split(changes, [config.num_global_crops], axis=1)
    names = ("global_photometric", "local_photometric")
    return {name: np.ascontiguousarray(group) for name, group in zip(names, groups, strict=True)}


def sample(rng: np.random.Generator, width: int, height: int, config: CropsConfig) -> CropParams:
    """Draw the parameters of every crop of a `width` x `height` image, in the order of `crop_kinds`.

    The size is the upright size; `pipeline.data.decoding.jpeg.open_image(file)` returns it without decoding.
    """
    if min(width, height) < 1:
        raise ValueError(f"an image has at least one pixel, not {width}x{height}")
    kinds = _kinds_table(config)
    table = np.zeros((len(kinds), NUM_COLUMNS))
    _draw(rng.random((len(kinds), _NUM_UNIFORMS)), width, height, kinds, _ORDERS, table)
    return CropParams(width, height, table, config)


def sample_image(seed: int, epoch: int, key: str, width: int, height: int, config: CropsConfig) -> CropParams:
    """Return `sample` with `crop_rng(seed, epoch, key)`; faster where code is compiled."""
    if MISSING:
        return sample(crop_rng(seed, epoch, key), width, height, config)
    kinds = _kinds_table(config)
    table = np.zeros((len(kinds), NUM_COLUMNS))
    digest = np.frombuffer(image_digest(seed, epoch, key), "<u8")
    _draw_from(digest, width, height, kinds, _ORDERS, table)
    return CropParams(width, height, table, config)


# Columns of the table that _draw reads: the settings of each crop.
(
    _SCALE, _LOG_ASPECT, _ASPECT, _FLIP_PROB, _JITTER_PROB, _SPANS, _GRAY_PROB, _BLUR_PROB, _BLUR_SIGMA,
    _SOLARIZE_PROB, _THRESHOLD, _SIDE, _VERTICAL_PROB, _TURN_PROB, _STAINS,
) = (0, 2, 4, 6, 7, 8, 16, 17, 18, 20, 21, 22, 23, 24, 25)  # fmt: skip


@lru_cache(maxsize=16)
def _kinds_table(config: CropsConfig) -> Table:
    return np.array(
        [
            [
                *kind.scale, *map(math.log, kind.aspect_ratio), *kind.aspect_ratio, kind.flip_prob, kind.jitter_prob,
                *(max(0.0, 1 - kind.brightness), 1 + kind.brightness),
                *(max(0.0, 1 - kind.contrast), 1 + kind.contrast),
                *(max(0.0, 1 - kind.saturation), 1 + kind.saturation),
                *(-kind.hue, kind.hue),
                kind.gray_prob, kind.blur_prob, *kind.blur_sigma, kind.solarize_prob, kind.solarize_threshold,
                kind.size, config.vertical_flip_prob, config.quarter_turn_prob, config.hed_jitter,
            ]
            for kind in crop_kinds(config)
        ]
    )  # fmt: skip


@compiled
def _between(low: float, high: float, uniform: float) -> float:
    return low + uniform * (high - low)


@compiled
def _draw_box(u: Table, width: int, height: int, kind: Table, crop: Table) -> None:
    """Draw a region as torchvision's RandomResizedCrop does.

    The area is uniform in the scale; the aspect ratio is log-uniform. After ten regions that do not fit
    inside the image, take the largest centred region of an allowed aspect ratio. Every image of at least one
    pixel has a result.
    """
    for i in range(_TRIES):
        area = width * height * _between(kind[_SCALE], kind[_SCALE + 1], u[i])
        aspect = math.exp(_between(kind[_LOG_ASPECT], kind[_LOG_ASPECT + 1], u[_TRIES + i]))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            crop[TOP] = math.floor(u[2 * _TRIES] * (height - box_height + 1))
            crop[LEFT] = math.floor(u[2 * _TRIES + 1] * (width - box_width + 1))
            crop[HEIGHT], crop[WIDTH] = box_height, box_width
            return
    box_width = max(1, min(width, round(height * kind[_ASPECT + 1])))
    box_height = max(1, min(height, round(width / kind[_ASPECT])))
    crop[TOP], crop[LEFT] = (height - box_height) // 2, (width - box_width) // 2
    crop[HEIGHT], crop[WIDTH] = box_height, box_width


@njit_cached
def _draw(
    uniforms: Table, width: int, height: int, kinds: Table, orders: npt.NDArray[np.int64], table: Table
) -> None:
    """Fill the table of an image's crops from uniform numbers [V, 33] and the settings of each crop."""
    for v in range(len(table)):
        kind, crop = kinds[v], table[v]
        _draw_box(uniforms[v], width, height, kind, crop)
        u = uniforms[v, 2 * _TRIES + 2 :]
        crop[FLIP] = u[0] < kind[_FLIP_PROB]
        if u[1] < kind[_JITTER_PROB]:
            order = orders[int(u[2] * len(orders))]
            place = 0
            for i in range(NUM_OPERATIONS):
                operation = order[i]
                low, high = kind[_SPANS + 2 * (operation - 1)], kind[_SPANS + 2 * (operation - 1) + 1]
                if low < high:  # an operation of strength 0 is left out
                    crop[OPERATIONS + place] = operation
                    crop[FACTORS + place] = _between(low, high, u[2 + operation])
                    place += 1
        crop[GRAY] = u[7] < kind[_GRAY_PROB]
        blurred = u[8] < kind[_BLUR_PROB]
        crop[SIGMA] = _between(kind[_BLUR_SIGMA], kind[_BLUR_SIGMA + 1], u[9]) if blurred else -1.0
        crop[SOLARIZE] = kind[_THRESHOLD] if u[10] < kind[_SOLARIZE_PROB] else 256.0
        crop[SIZE] = kind[_SIDE]
        draw_later(u, kind[_VERTICAL_PROB], kind[_TURN_PROB], kind[_STAINS], crop)


@njit_cached
def _draw_from(
    digest: npt.NDArray[np.uint64],
    width: int,
    height: int,
    kinds: Table,
    orders: npt.NDArray[np.int64],
    table: Table,
) -> None:
    """Run `_draw` with the random numbers of an image."""
    uniforms = np.empty((len(table), _NUM_UNIFORMS))
    fill_uniform(digest[0], digest[1], uniforms)
    _draw(uniforms, width, height, kinds, orders, table)


@njit_cached
def measure(table: Table) -> tuple[float, float, int, float]:
    """Return (lowest and highest region side per pixel of its crop's side, highest size, highest sigma)."""
    least, most, size, sigma = math.inf, 0.0, 0.0, 0.0
    for v in range(len(table)):
        crop = table[v]
        least = min(least, min(crop[HEIGHT], crop[WIDTH]) / crop[SIZE])
        most = max(most, max(crop[HEIGHT], crop[WIDTH]) / crop[SIZE])
        size, sigma = max(size, crop[SIZE]), max(sigma, crop[SIGMA])
    return least, most, int(size), sigma


@njit_cached
def first_outside(
    table: Table, width: int, height: int, num_global_crops: int, global_size: int, local_size: int
) -> int:
    """Return the first crop that exceeds the picture or lacks its config's size; -1 if there is none."""
    for v in range(len(table)):
        crop = table[v]
        size = global_size if v < num_global_crops else local_size
        inside = (crop[TOP] >= 0) & (crop[TOP] + crop[HEIGHT] <= height + 1e-6) & (crop[HEIGHT] > 0)
        inside &= (crop[LEFT] >= 0) & (crop[LEFT] + crop[WIDTH] <= width + 1e-6) & (crop[WIDTH] > 0)
        if not (inside & (crop[SIZE] == size)):
            return v
    return -1


def _one_crop(row: list[float]) -> OneCrop:
    operations = row[OPERATIONS : OPERATIONS + NUM_OPERATIONS]
    factors = row[FACTORS : FACTORS + NUM_OPERATIONS]
    top, left, height, width = map(int, row[TOP : WIDTH + 1])
    return OneCrop(
        top,
        left,
        height,
        width,
        flip=bool(row[FLIP]),
        jitter=tuple((_NAMES[int(o)], f) for o, f in zip(operations, factors, strict=True) if o),
        gray=bool(row[GRAY]),
        blur_sigma=row[SIGMA] if row[SIGMA] >= 0 else None,
        solarize=int(row[SOLARIZE]) if row[SOLARIZE] < 256 else None,
        size=int(row[SIZE]),
        vertical_flip=bool(row[VERTICAL_FLIP]),
        quarter_turn=bool(row[QUARTER_TURN]),
        stains=tuple(row[STAINS:NUM_COLUMNS]) if row[STAINS] else None,
    )


def _row(crop: OneCrop) -> list[float]:
    operations: list[float] = [_NAMES.index(name) for name, _ in crop.jitter]
    factors = [factor for _, factor in crop.jitter]
    nothing = [0.0] * (NUM_OPERATIONS - len(operations))
    sigma = -1.0 if crop.blur_sigma is None else crop.blur_sigma
    level = 256 if crop.solarize is None else crop.solarize
    return [
        *crop[:4],
        crop.flip,
        *operations,
        *nothing,
        *factors,
        *nothing,
        crop.gray,
        sigma,
        level,
        crop.size,
        crop.vertical_flip,
        crop.quarter_turn,
        *(crop.stains or [0.0] * 2 * NUM_STAINS),
    ]
