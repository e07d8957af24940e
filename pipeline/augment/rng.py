"""The random numbers of an image's crops: a function of (seed, epoch, key) alone, on any machine.

numpy's Philox generator defines the numbers. Creating a generator takes longer than drawing from it, so the
stream fills its rows with the same numbers in compiled code. No crops here.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.augment.jit import compiled

_U64 = np.uint64
_MULTIPLIERS = (_U64(0xD2E7470EE14C6C93), _U64(0xCA5A826395121157))
_STEPS = (_U64(0x9E3779B97F4A7C15), _U64(0xBB67AE8584CAA73B))
_ROUNDS = 10
_LOW, _HALF, _MANTISSA = _U64(0xFFFFFFFF), _U64(32), _U64(11)


def image_digest(seed: int, epoch: int, key: str) -> bytes:
    """Return 16 bytes that identify an image in an epoch."""
    # surrogatepass: the name of a local file need not be valid text.
    text = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def crop_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Return the random generator of one image in one epoch."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(image_digest(seed, epoch, key), "little")))


@compiled
def fill_uniform(low: Any, high: Any, rows: npt.NDArray[np.float64]) -> None:
    """Fill `rows` with the numbers of `crop_rng(...).random(rows.shape)`.

    `low` and `high` are the lower and upper 64 bits of that generator's digest. Philox-4x64-10: Salmon et
    al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    flat = rows.reshape(-1)
    for block in range(0, len(flat), 4):
        a, b, c, d = _U64(block // 4 + 1), _U64(0), _U64(0), _U64(0)
        first, second = low, high
        for _ in range(_ROUNDS):
            high_a, low_a = _product(_MULTIPLIERS[0], a)
            high_c, low_c = _product(_MULTIPLIERS[1], c)
            a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
            first, second = first + _STEPS[0], second + _STEPS[1]
        number = (a, b, c, d)
        for i in range(min(4, len(flat) - block)):
            flat[block + i] = np.float64(number[i] >> _MANTISSA) * (1.0 / 9007199254740992.0)


@compiled
def _product(x: Any, y: Any) -> tuple[Any, Any]:
    """Return the upper and lower 64 bits of the product of two 64-bit numbers."""
    x_low, x_high, y_low, y_high = x & _LOW, x >> _HALF, y & _LOW, y >> _HALF
    low, cross = x_low * y_low, x_high * y_low
    middle = cross + (low >> _HALF)
    other = x_low * y_high + (middle & _LOW)
    return x_high * y_high + (middle >> _HALF) + (other >> _HALF), x * y
