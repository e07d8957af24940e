"""The fast kernel: every crop of a decoded picture in one compiled call.

Each crop is resampled from the picture into three planes that lie on their side (x runs over rows, so that both
passes of the filter run along memory), coloured, blurred across x, stood upright, blurred across y, and woven into
RGB. PIL rounds to 8 bits between the filter's passes; here 6 more bits are kept. Needs numba; kernel_torch.py does
without. Knows nothing of files, decoding or random numbers.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import crop_params as columns
from pipeline.colour_kernel import (
    blend,
    blur_and_transpose,
    mean_luma,
    saturate,
    solarize,
    to_gray,
    transpose,
    turn_hue,
)
from pipeline.compiled import compiled, compiled_and_kept
from pipeline.vectors import LANES, ROW_BYTES, transpose_words, weave, weigh_columns, weigh_rows

SLACK = 2 * ROW_BYTES
"""Bytes that must be readable behind a picture, and writable behind a plane."""

_ONE = 16384
"""A weight of 1."""


class Scratch:
    """Memory that the kernel works in, one per thread: it grows to the largest picture's width and stays."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def bytes(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        """At least `size` uint8 of any content; the same memory for the same name."""
        return self._array(name, size, np.uint8)

    def for_crops(
        self, width: int, table: npt.NDArray[np.float64], filter_width: float
    ) -> tuple[npt.NDArray[Any], ...]:
        """What `crop_all` works in for a picture of `width` columns."""
        size = int(table[:, columns.SIZE].max())
        pitch = -(-size // LANES) * LANES
        sides = table[:, columns.HEIGHT : columns.WIDTH + 1] / table[:, columns.SIZE : columns.SIZE + 1]
        taps = int(2 * filter_width * max(1.0, sides.max())) + 3
        pads = 2 * (int(max(0.0, table[:, columns.SIGMA].max())) + 3)
        plane = pitch * pitch + SLACK
        values = self._array("filter", taps, np.float64)
        return (
            self._array("tile", LANES * ROW_BYTES, np.int16),
            self._array("columns", (3 * width + 2 * ROW_BYTES) * LANES, np.int16),
            self._array("planes", 6 * plane, np.uint8),
            self._array("blurred", 2 * ((pitch + pads) * pitch + SLACK), np.uint8),
            self._array("places", 4 * pitch, np.int64),
            self._array("weights", 2 * pitch * len(values), np.int16),
            values,
        )

    def _array(self, name: str, size: int, dtype: Any) -> npt.NDArray[Any]:
        array = self._arrays.get(name)
        if array is None or len(array) < size:
            array = self._arrays[name] = np.zeros(size, dtype)
        return array


@compiled
def filter_weight(distance: float, bilinear: bool) -> float:
    """The filter at a distance from its centre: PIL's bicubic (a = -1/2), or a triangle."""
    x = abs(distance)
    if bilinear:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@compiled
def weigh_axis(
    start: float,
    length: float,
    size: int,
    limit: int,
    bilinear: bool,
    lows: Any,
    counts: Any,
    weights: Any,
    values: Any,
) -> tuple[int, int]:  # fmt: skip
    """Which source pixels make each of `size` target pixels along one axis, and their weights, which sum to 1.

    A box ends where it ends: what lies beyond it in the picture is not seen. Returns its whole pixels, [low, high).
    """
    low, high = math.floor(start), min(math.ceil(start + length), limit)
    scale = length / size
    stretch = max(1.0, scale)
    inverse = 1.0 / stretch
    support = (1.0 if bilinear else 2.0) * stretch
    for i in range(size):
        center = start + (i + 0.5) * scale
        first = min(max(low, int(center - support + 0.5)), high - 1)
        taps = max(min(high, int(center + support + 0.5)), first + 1) - first
        total = 0.0
        for t in range(taps):
            values[t] = filter_weight((t + first - center + 0.5) * inverse, bilinear)
            total += values[t]
        if total == 0.0:
            values[0] = total = 1.0
        rest, best, norm = _ONE, 0, _ONE / total
        for t in range(taps):
            weight = math.floor(values[t] * norm + 0.5)
            rest -= weight
            weights[i, t] = weight
            if values[t] > values[best]:
                best = t
        weights[i, best] += rest
        lows[i], counts[i] = first, taps
    return low, high


@compiled
def resample(
    picture_at: int, stride: int, height: int, width: int, crop: Any, pitch: int, plane_bytes: int, planes: Any,
    bilinear: bool, tile: Any, turned: Any, places: Any, weights: Any, values: Any,
) -> None:  # fmt: skip
    """Filter a box of the picture into three planes, x over rows, mirrored if the crop is."""
    size = int(crop[columns.SIZE])
    tops, row_taps, lefts, taps = places[:pitch], places[pitch:], places[2 * pitch :], places[3 * pitch :]
    row_weights, column_weights = weights[0], weights[1]
    weigh_axis(
        crop[columns.TOP], crop[columns.HEIGHT], size, height, bilinear, tops, row_taps, row_weights, values
    )
    left, right = weigh_axis(
        crop[columns.LEFT], crop[columns.WIDTH], size, width, bilinear, lefts, taps, column_weights, values
    )
    source_at = picture_at + 3 * left
    weights_stride = 2 * row_weights.shape[1]
    row_weights_at, column_weights_at = row_weights.ctypes.data, column_weights.ctypes.data
    tile_at, turned_at, planes_at = tile.ctypes.data, turned.ctypes.data, planes.ctypes.data
    for block in range(0, size, LANES):
        for chunk in range(0, 3 * (right - left), ROW_BYTES):
            for i in range(LANES):
                y = min(block + i, size - 1)
                weigh_rows(
                    source_at + tops[y] * stride + chunk, stride,
                    row_weights_at + y * weights_stride, row_taps[y], row_taps[y] >> 1, tile_at + 2 * i * ROW_BYTES,
                )  # fmt: skip
            for i in range(0, ROW_BYTES, LANES):
                transpose_words(
                    tile_at + 2 * i, 2 * ROW_BYTES, turned_at + (chunk + i) * 2 * LANES, 2 * LANES
                )
        for x in range(size):
            row = size - 1 - x if crop[columns.FLIP] else x
            weigh_columns(
                turned_at + (lefts[x] - left) * 3 * 2 * LANES, column_weights_at + x * weights_stride, taps[x],
                (taps[x] >> 1) + 16, planes_at + row * pitch + block, plane_bytes,
            )  # fmt: skip


@compiled
def colour(crop: Any, red: Any, green: Any, blue: Any, size: int, pitch: int) -> None:
    """The colour operations of a crop in their order."""
    n = size * pitch
    for i in range(columns.NUM_OPERATIONS):
        operation, factor = int(crop[columns.OPERATIONS + i]), crop[columns.FACTORS + i]
        if operation == columns.BRIGHTNESS:
            blend(red, n, 0.0, factor)
            blend(green, n, 0.0, factor)
            blend(blue, n, 0.0, factor)
        elif operation == columns.CONTRAST:
            level = float(mean_luma(red, green, blue, size, pitch))
            blend(red, n, level, factor)
            blend(green, n, level, factor)
            blend(blue, n, level, factor)
        elif operation == columns.SATURATION:
            saturate(red, green, blue, n, factor)
        elif operation == columns.HUE:
            turn_hue(red, green, blue, n, int(factor * 255) % 256)


@compiled
def write(red: Any, green: Any, blue: Any, size: int, pitch: int, out: Any) -> None:
    """Three upright planes to uint8 [size,size,3]."""
    red_at, green_at, blue_at, out_at = red.ctypes.data, green.ctypes.data, blue.ctypes.data, out.ctypes.data
    for y in range(size):
        for start in range(0, size - LANES + 1, LANES):
            i = y * pitch + start
            weave(red_at + i, green_at + i, blue_at + i, out_at + 3 * (y * size + start))
        for x in range(size - size % LANES, size):
            i = y * pitch + x
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = red[i], green[i], blue[i]


@compiled_and_kept
def crop_all(
    picture: Any, height: int, width: int, table: Any, bilinear: bool, num_global_crops: int,
    global_crops: Any, local_crops: Any,
    tile: Any, turned: Any, planes: Any, blurred: Any, places: Any, weights: Any, values: Any,
) -> None:  # fmt: skip
    """Make the crops of `table` [V, ...] from a picture, flat uint8 [height * width * 3 + SLACK] RGB."""
    for v in range(len(table)):
        crop = table[v]
        size = int(crop[columns.SIZE])
        pitch = -(-size // LANES) * LANES
        plane = pitch * pitch + SLACK
        taps = len(values)
        resample(
            picture.ctypes.data, 3 * width, height, width, crop, pitch, plane, planes, bilinear,
            tile, turned, places, weights[: 2 * pitch * taps].reshape(2, pitch, taps), values,
        )  # fmt: skip
        red, green, blue = planes[:plane], planes[plane : 2 * plane], planes[2 * plane : 3 * plane]
        colour(crop, red, green, blue, size, pitch)
        gray = crop[columns.GRAY] != 0
        if gray:
            to_gray(red, green, blue, size * pitch)
        sigma, threshold = crop[columns.SIGMA], int(crop[columns.SOLARIZE])
        half = len(blurred) // 2
        for channel in range(1 if gray else 3):
            source = planes[channel * plane : (channel + 1) * plane]
            target = planes[(3 + channel) * plane : (4 + channel) * plane]
            if sigma >= 0:
                blur_and_transpose(source, target, blurred[:half], blurred[half:], size, pitch, sigma)
            else:
                transpose(source.ctypes.data, target.ctypes.data, pitch)
            if threshold < 256:
                solarize(target, size * pitch, threshold)
        out = global_crops[v] if v < num_global_crops else local_crops[v - num_global_crops]
        red = planes[3 * plane : 4 * plane]
        green = red if gray else planes[4 * plane : 5 * plane]
        blue = red if gray else planes[5 * plane : 6 * plane]
        write(red, green, blue, size, pitch, out)
