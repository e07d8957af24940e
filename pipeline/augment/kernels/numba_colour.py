"""Pixel operations of the fast kernel, in place on flat uint8 planes; opencv_colour.py is the OpenCV version.

Each operation matches PIL, including its rounding. Blends are float32 and truncated, HSV has 8 bits per
channel, and the blur is six box passes, each rounded. The loops over a plane have no branches, so that LLVM
vectorises them. The caller decides on the pixels and the order of operations.
"""

import math

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.augment import stains
from dinoray.pipeline.augment.jit import compiled
from dinoray.pipeline.augment.kernels.simd import BOX_BYTES, LANES, box, transpose_bytes

Plane = npt.NDArray[np.uint8]

_AMOUNTS, _STAINS, _DENSITIES, _LEVELS = stains.AMOUNTS, stains.STAINS, stains.DENSITIES, stains.LEVELS
_LAST_STEP = len(_LEVELS) - 1
_F, _I, _U8, _U32 = np.float32, np.int32, np.uint8, np.uint32


@compiled
def blend(plane: Plane, n: int, level: float, factor: float) -> None:
    """Set each value to level + factor * (value - level)."""
    base, slope = _F(level), _F(factor)
    for i in range(n):
        value = base + slope * (_F(plane[i]) - base)
        plane[i] = _U8(_I(min(max(value, _F(0)), _F(255))))


@compiled
def luma(red: float, green: float, blue: float) -> float:
    """Return the ITU-R 601 luma in PIL's fixed point.

    All numbers here are whole and below 2^24, so float32 holds them exactly.
    """
    total = _F(red) * _F(19595) + _F(green) * _F(38470) + _F(blue) * _F(7471) + _F(32768)
    return _F(_I(total * _F(1 / 65536)))


@compiled
def mean_luma(red: Plane, green: Plane, blue: Plane, size: int, pitch: int) -> int:
    """Return the mean luma of the `size` x `size` pixels, rounded."""
    total = 0
    for row in range(0, size * pitch, pitch):
        # Views, because an index that may count from the end keeps numba from vectorising a loop.
        r, g, b = red[row : row + size], green[row : row + size], blue[row : row + size]
        row_total = _I(0)
        for i in range(size):
            row_total = _I(row_total + _I(luma(r[i], g[i], b[i])))  # otherwise numba counts in 64 bits
        total += row_total
    return int(total / (size * size) + 0.5)


@compiled
def mean_level(plane: Plane, size: int, pitch: int) -> int:
    """Return the mean of one channel of the `size` x `size` pixels, rounded."""
    total = 0
    for row in range(0, size * pitch, pitch):
        values = plane[row : row + size]
        for i in range(size):
            total += _I(values[i])
    return int(total / (size * size) + 0.5)


@compiled
def saturate(red: Plane, green: Plane, blue: Plane, n: int, factor: float) -> None:
    """Blend each pixel with its own gray."""
    slope = _F(factor)
    for i in range(n):
        gray = luma(red[i], green[i], blue[i])
        red[i] = _U8(_I(min(max(gray + slope * (_F(red[i]) - gray), _F(0)), _F(255))))
        green[i] = _U8(_I(min(max(gray + slope * (_F(green[i]) - gray), _F(0)), _F(255))))
        blue[i] = _U8(_I(min(max(gray + slope * (_F(blue[i]) - gray), _F(0)), _F(255))))


@compiled
def jitter_stains(red: Plane, green: Plane, blue: Plane, n: int, changes: Plane) -> None:
    """Multiply the amounts of the three stains by `changes[:3]`, and add `changes[3:]`."""
    mixed = np.zeros((4, 3), _F)
    for j in range(3):
        for k in range(3):
            for i in range(3):
                mixed[i, j] += _F(_AMOUNTS[i, k] * changes[k] * _STAINS[k, j])
            mixed[3, j] += _F(changes[3 + k] * _STAINS[k, j])
    for i in range(n):
        r, g, b = _DENSITIES[red[i]], _DENSITIES[green[i]], _DENSITIES[blue[i]]
        red[i] = _LEVELS[_step(r * mixed[0, 0] + g * mixed[1, 0] + b * mixed[2, 0] + mixed[3, 0])]
        green[i] = _LEVELS[_step(r * mixed[0, 1] + g * mixed[1, 1] + b * mixed[2, 1] + mixed[3, 1])]
        blue[i] = _LEVELS[_step(r * mixed[0, 2] + g * mixed[1, 2] + b * mixed[2, 2] + mixed[3, 2])]


@compiled
def _step(density: float) -> int:
    return _I(min(max(density * _F(stains.STEPS) + _F(0.5), _F(0)), _F(_LAST_STEP)))


@compiled
def to_gray(red: Plane, green: Plane, blue: Plane, n: int) -> None:
    """Overwrite the first plane with the luma."""
    for i in range(n):
        red[i] = _U8(_I(luma(red[i], green[i], blue[i])))


@compiled
def turn_hue(red: Plane, green: Plane, blue: Plane, n: int, shift: int) -> None:
    """Turn the hue by `shift` 256ths, in HSV with 8 bits per channel."""
    turn = _F(shift)
    for i in range(n):
        r, g, b = _F(red[i]), _F(green[i]), _F(blue[i])
        v = max(r, max(g, b))
        chroma = v - min(r, min(g, b))
        unit = _F(1) / max(chroma, _F(1))
        h = (r - g) * unit + _F(4)
        h = (b - r) * unit + _F(2) if v == g else h
        h = (g - b) * unit if v == r else h
        h = h * _F(1 / 6) + _F(1)
        h = _F(_I((h - _F(_I(h))) * _F(255))) + turn
        h = (h - _F(256) if h >= _F(256) else h) * _F(6 / 255)
        # v times the 8-bit saturation: the difference between v and the lowest channel.
        lack = _F(_I(chroma / max(v, _F(1)) * _F(255))) * _F(1 / 255) * v
        red[i] = _U8(_I(v - lack * _share(h + _F(5)) + _F(0.5)))
        green[i] = _U8(_I(v - lack * _share(h + _F(3)) + _F(0.5)))
        blue[i] = _U8(_I(v - lack * _share(h + _F(1)) + _F(0.5)))


@compiled
def _share(h: float) -> float:
    """Return the share of the lack for a channel whose own hue is 5 on a circle of 6.

    The share is 1 from 1 to 3 and 0 from 4 to 6.
    """
    h = h - _F(6) if h >= _F(6) else h
    return max(_F(0), min(min(h, _F(4) - h), _F(1)))


@compiled
def solarize(plane: Plane, n: int, threshold: int) -> None:
    """Invert values of `threshold` or more."""
    for i in range(n):
        value = _I(plane[i])
        plane[i] = _U8(_I(255) - value if value >= threshold else value)


@compiled
def box_weights(sigma: float) -> tuple[int, int, int]:
    """Return one of three equal boxes: (whole pixels on either side, their weight, weight of the two ends).

    Weights are in units of 2^-24. Gwosdek et al., Theoretical foundations of Gaussian convolution by extended
    box filtering (SSVM 2011), eq. 7, 11 and 14. Values are rounded to float32 wherever PIL rounds, so that
    the weights equal PIL's.
    """
    variance = _F(sigma) * _F(sigma) / _F(3)
    length = _F(math.sqrt(12.0 * np.float64(variance) + 1.0))
    full = _F(math.floor((np.float64(length) - 1.0) / 2.0))
    end = (_F(2) * full + _F(1)) * (full * (full + _F(1)) - _F(3) * variance)
    radius = full + end / (_F(6) * (variance - (full + _F(1)) * (full + _F(1))))
    whole = int(radius)
    inner = int(_F(1 << 24) / (radius * _F(2) + _F(1)))
    return whole, inner, ((1 << 24) - (2 * whole + 1) * inner) // 2


@compiled
def copy(source: Plane, out: Plane, n: int) -> None:
    """Copy the first `n` bytes."""
    for i in range(n):
        out[i] = source[i]


@compiled
def blur_rows(a: Plane, b: Plane, size: int, pitch: int, whole: int, inner: int, outer: int) -> None:
    """Apply three box passes across rows, from `a` to `b`; the first row of both is `whole` + 1 rows down."""
    first = (whole + 1) * pitch
    source, out = a, b
    for _ in range(3):
        last = first + (size - 1) * pitch
        for k in range(pitch, (whole + 2) * pitch, pitch):
            copy(source[first:], source[first - k :], pitch)
            copy(source[last:], source[last + k :], pitch)
        source_at, out_at = source.ctypes.data, out.ctypes.data
        for i in range(first, first + size * pitch, pitch):
            for j in range(i, i + pitch, BOX_BYTES):
                at = source_at + j
                left, right = at - (whole + 1) * pitch, at + (whole + 1) * pitch
                box(at - whole * pitch, pitch, 2 * whole + 1, left, right, inner, outer, out_at + j)
        source, out = out, source


@compiled
def transpose(source_at: int, out_at: int, pitch: int) -> None:
    """Transpose a plane of `pitch` x `pitch` bytes."""
    for i in range(0, pitch, LANES):
        for j in range(0, pitch, LANES):
            transpose_bytes(source_at + i * pitch + j, pitch, out_at + j * pitch + i, pitch)


@compiled
def blur_and_transpose(
    plane: Plane, out: Plane, a: Plane, b: Plane, size: int, pitch: int, sigma: float
) -> None:
    """Blur `plane` across rows, transpose it, blur across rows again into `out`; `a` and `b` are scratch."""
    whole, inner, outer = box_weights(sigma)
    first = (whole + 1) * pitch
    copy(plane, a[first:], size * pitch)
    blur_rows(a, b, size, pitch, whole, inner, outer)
    transpose(b.ctypes.data + first, a.ctypes.data + first, pitch)
    blur_rows(a, b, size, pitch, whole, inner, outer)
    copy(b[first:], out, size * pitch)
