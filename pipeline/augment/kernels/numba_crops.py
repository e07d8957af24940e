"""The fast kernel: every crop of a decoded picture in one compiled call.

Each crop is resampled from the picture into three transposed planes. There x runs over rows, so that both
passes of the filter run along memory. The planes are then coloured, blurred across x, transposed back,
blurred across y and interleaved to RGB. PIL rounds to 8 bits between the filter's passes; this kernel keeps 6
more bits. It needs numba; torch_crops.py does not. There are no files, no decoding and no random numbers
here.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.augment import params as columns
from dinoray.pipeline.augment.jit import compiled, njit_cached
from dinoray.pipeline.augment.kernels.numba_colour import (
    blend,
    blur_and_transpose,
    copy,
    jitter_stains,
    mean_level,
    mean_luma,
    saturate,
    solarize,
    to_gray,
    transpose,
    turn_hue,
)
from dinoray.pipeline.augment.kernels.simd import (
    LANES,
    ROW_BYTES,
    STRIP,
    transpose_words,
    weave,
    weigh_columns,
    weigh_half_columns,
    weigh_rows,
)
from dinoray.pipeline.augment.later_draws import QUARTER_TURN, STAINS, VERTICAL_FLIP

SLACK = 2 * ROW_BYTES
"""Bytes that must be readable after a picture and writable after a plane."""

GROUP_BYTES = 8 * ROW_BYTES

_ONE = 16384
"""The weight 1 in fixed point."""


class Scratch:
    """Working memory of the kernel, one per thread: it grows to the largest picture's width and stays."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def bytes(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        """Return at least `size` uint8 of arbitrary content; the same memory for the same name."""
        return self._array(name, size, np.uint8)

    def for_crops(
        self, width: int, table: npt.NDArray[np.float64], filter_width: float
    ) -> tuple[npt.NDArray[Any], ...]:
        """Return the working memory of `crop_all` for a picture of `width` columns."""
        _, most, size, sigma = columns.measure(table)
        pitch = -(-size // LANES) * LANES
        taps = int(2 * filter_width * max(1.0, most)) + 3
        pads = 2 * (int(sigma) + 3)
        plane = pitch * pitch + SLACK
        return (
            self._array("tile", STRIP * GROUP_BYTES, np.int16),
            self._array("columns", (3 * width + 2 * ROW_BYTES) * STRIP, np.int16),
            self._array("planes", 6 * plane, np.uint8),
            self._array("blurred", 2 * ((pitch + pads) * pitch + SLACK), np.uint8),
            self._array("places", 2 * pitch, np.int64),
            self._array("counts", 2 * pitch, np.int32),
            self._array("weights", 2 * pitch * taps, np.int16),
            self._array("values", pitch * taps, np.float32),
            self._array("sums", 3 * pitch, np.float32),
        )

    def _array(self, name: str, size: int, dtype: Any) -> npt.NDArray[Any]:
        array = self._arrays.get(name)
        if array is None or len(array) < size:
            array = self._arrays[name] = np.zeros(size, dtype)
        return array


@compiled
def weigh_axis(
    start: float, length: float, size: int, limit: int, bilinear: bool, pitch: int,
    lows: Any, counts: Any, weights: Any, values: Any, sums: Any,
) -> tuple[int, int]:  # fmt: skip
    """Compute the source pixels of `size` target pixels along one axis, and their weights, which sum to 1.

    `lows` and `counts` [size] are the first source pixel and the number of source pixels. `weights` is int16
    [most taps, pitch]. Pixels of the picture outside the box are not used. Returns the whole pixels of the
    box, [low, high).
    """
    low, high = math.floor(start), min(math.ceil(start + length), limit)
    scale = length / size
    stretch = max(1.0, scale)
    inverse = 1.0 / stretch
    support = (1.0 if bilinear else 2.0) * stretch
    offsets, totals = sums[:pitch], sums[pitch : 2 * pitch]
    most = 1
    for i in range(size):
        center = start + (i + 0.5) * scale
        first = min(max(low, int(center - support + 0.5)), high - 1)
        count = max(min(high, int(center + support + 0.5)), first + 1) - first
        lows[i], counts[i] = first, count
        offsets[i] = (first - center + 0.5) * inverse
        most = max(most, count)
    totals[:size] = 0
    # From here on tap by tap, for all targets at once, so that the loops are vectorised.
    for t in range(most):
        row, at = values[t * pitch : (t + 1) * pitch], np.float32(t * inverse)
        for i in range(size):
            x = abs(offsets[i] + at)
            near = (np.float32(1.5) * x - np.float32(2.5)) * x * x + np.float32(1)
            far = ((np.float32(-0.5) * x + np.float32(2.5)) * x - np.float32(4)) * x + np.float32(2)
            value = near if x < np.float32(1) else far
            if bilinear:
                value = np.float32(1) - x
            value = value if x < np.float32(1 if bilinear else 2) else np.float32(0)
            value = value if t < counts[i] else np.float32(0)
            row[i] = value
            totals[i] += value
    rests = sums[2 * pitch : 3 * pitch]
    rests[:size] = _ONE
    for t in range(most):
        row, out = values[t * pitch : (t + 1) * pitch], weights[t * pitch : (t + 1) * pitch]
        for i in range(size):
            weight = np.int32(row[i] * (np.float32(_ONE) / totals[i]) + np.float32(_ONE + 0.5)) - np.int32(
                _ONE
            )
            out[i] = weight
            rests[i] -= np.float32(weight)
    for i in range(size):  # the rounding error goes to the pixel in the middle
        middle = min(max(0, int(start + (i + 0.5) * scale) - lows[i]), counts[i] - 1)
        weights[middle * pitch + i] += np.int16(rests[i])
    return low, high


@compiled
def resample(
    picture_at: int, stride: int, height: int, width: int, crop: Any, pitch: int, plane_bytes: int, planes: Any,
    bilinear: bool, tile: Any, turned: Any, places: Any, counts: Any, weights: Any, values: Any, sums: Any,
) -> None:  # fmt: skip
    """Filter a box of the picture into three planes, x over rows; mirror it if the crop is flipped.

    A quarter turn is a flip here, and a transposition later.
    """
    size = int(crop[columns.SIZE])
    is_mirrored, is_upside_down = crop[columns.FLIP] != crop[QUARTER_TURN], crop[VERTICAL_FLIP] != 0
    tops, lefts, row_taps, taps = places[:pitch], places[pitch:], counts[:pitch], counts[pitch:]
    half = len(weights) // 2
    row_weights, column_weights = weights[:half], weights[half:]
    weigh_axis(
        crop[columns.TOP], crop[columns.HEIGHT], size, height, bilinear, pitch,
        tops, row_taps, row_weights, values, sums,
    )  # fmt: skip
    left, right = weigh_axis(
        crop[columns.LEFT], crop[columns.WIDTH], size, width, bilinear, pitch,
        lefts, taps, column_weights, values, sums,
    )  # fmt: skip
    source_at = picture_at + 3 * left
    row_weights_at, column_weights_at = row_weights.ctypes.data, column_weights.ctypes.data
    tile_at, turned_at, planes_at = tile.ctypes.data, turned.ctypes.data, planes.ctypes.data
    for strip in range(0, size, STRIP):
        rows = STRIP if size - strip > LANES else LANES
        # Number of bytes of a row before the next row: enough for the prefetcher, few enough for the cache.
        for group in range(0, 3 * (right - left), GROUP_BYTES):
            end = min(group + GROUP_BYTES, 3 * (right - left))
            for i in range(rows):
                y = min(strip + i, size - 1)
                y = size - 1 - y if is_upside_down else y
                for chunk in range(group, end, ROW_BYTES):
                    weigh_rows(
                        source_at + tops[y] * stride + chunk, stride, row_weights_at + 2 * y, 2 * pitch,
                        row_taps[y], row_taps[y] >> 1, tile_at + 2 * (i * GROUP_BYTES + chunk - group),
                    )  # fmt: skip
            for i in range(0, rows, LANES):
                for j in range(group, end, LANES):
                    transpose_words(
                        tile_at + 2 * (i * GROUP_BYTES + j - group), 2 * GROUP_BYTES,
                        turned_at + 2 * (j * STRIP + i), 2 * STRIP,
                    )  # fmt: skip
        for x in range(size):
            row = size - 1 - x if is_mirrored else x
            source, out = turned_at + (lefts[x] - left) * 3 * 2 * STRIP, planes_at + row * pitch + strip
            weights_at, bias = column_weights_at + 2 * x, (taps[x] >> 1) + 16
            if rows == STRIP:
                weigh_columns(source, weights_at, 2 * pitch, taps[x], bias, out, plane_bytes)
            else:
                weigh_half_columns(source, weights_at, 2 * pitch, taps[x], bias, out, plane_bytes)


@compiled
def colour(crop: Any, red: Any, green: Any, blue: Any, size: int, pitch: int, is_rgb: bool) -> None:
    """Apply the colour operations of a crop in their order; without RGB each channel is a gray picture of its own."""
    n = size * pitch
    for i in range(columns.NUM_OPERATIONS):
        operation, factor = int(crop[columns.OPERATIONS + i]), crop[columns.FACTORS + i]
        if operation == columns.BRIGHTNESS:
            blend(red, n, 0.0, factor)
            blend(green, n, 0.0, factor)
            blend(blue, n, 0.0, factor)
        elif operation == columns.CONTRAST and not is_rgb:
            blend(red, n, float(mean_level(red, size, pitch)), factor)
            blend(green, n, float(mean_level(green, size, pitch)), factor)
            blend(blue, n, float(mean_level(blue, size, pitch)), factor)
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
    """Write three upright planes to uint8 [size,size,3]."""
    red_at, green_at, blue_at, out_at = red.ctypes.data, green.ctypes.data, blue.ctypes.data, out.ctypes.data
    for y in range(size):
        for start in range(0, size - LANES + 1, LANES):
            i = y * pitch + start
            weave(red_at + i, green_at + i, blue_at + i, out_at + 3 * (y * size + start))
        for x in range(size - size % LANES, size):
            i = y * pitch + x
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = red[i], green[i], blue[i]


@njit_cached
def crop_all(
    picture: Any, height: int, width: int, table: Any, bilinear: bool, is_rgb: bool, num_global_crops: int,
    global_crops: Any, local_crops: Any,
    tile: Any, turned: Any, planes: Any, blurred: Any,
    places: Any, counts: Any, weights: Any, values: Any, sums: Any,
) -> None:  # fmt: skip
    """Make the crops of `table` [V, ...] from a picture of three channels, flat uint8 [height * width * 3 + SLACK]."""
    for v in range(len(table)):
        crop = table[v]
        size = int(crop[columns.SIZE])
        pitch = -(-size // LANES) * LANES
        plane = pitch * pitch + SLACK
        resample(
            picture.ctypes.data, 3 * width, height, width, crop, pitch, plane, planes, bilinear,
            tile, turned, places, counts, weights, values, sums,
        )  # fmt: skip
        red, green, blue = planes[:plane], planes[plane : 2 * plane], planes[2 * plane : 3 * plane]
        if crop[QUARTER_TURN] != 0:
            for channel in range(3):
                source = planes[channel * plane : (channel + 1) * plane]
                copy(source, blurred, pitch * pitch)
                transpose(blurred.ctypes.data, source.ctypes.data, pitch)
        if crop[STAINS] != 0:
            jitter_stains(red, green, blue, size * pitch, crop[STAINS:])
        colour(crop, red, green, blue, size, pitch, is_rgb)
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
