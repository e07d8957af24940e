"""The samples of an image as its file holds them, and how they become the uint8 pixels that a network learns from.

Samples of 8 bits are pixels. Deeper ones are mapped linearly: `data.value_range` names the values that become 0 and
255. Without it, samples of 16 bits keep their high byte, and those without a fixed range are refused. No files and
no Ray here.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage

Pixels = npt.NDArray[np.uint8]
Range = tuple[float, float]


class Samples(NamedTuple):
    """The samples of a picture, [H,W,C] of any depth; upright and C-contiguous once `decode` returns them."""

    values: npt.NDArray[Any]
    num_colours: int
    """Channels that are colours: 1 gray, 3 red, green and blue; or C, where the file does not say what they are."""
    has_alpha: bool = False
    """The channel behind the colours says how opaque they are."""
    is_multiplied: bool = False
    """Colours are multiplied by the alpha behind them."""
    is_inverted: bool = False
    """The lowest value is white."""

    @property
    def is_deep(self) -> bool:
        """Return True if a sample has more than 8 bits."""
        return bool(self.values.dtype != np.uint8)


def to_pixels(samples: Samples, config: PixelsConfig) -> Pixels:
    """Return samples as uint8 [H,W,`config.channels`].

    With three channels the picture is RGB: gray is repeated, transparency is laid over white, and what is neither
    colour nor transparency is left out. Otherwise all channels are taken as they are. Raises BadImage if the samples
    cannot be that.
    """
    value_range = config.value_range
    if value_range == "auto":
        value_range = _by_bits(samples.values[..., : samples.num_colours])
    if config.channels == 3:
        return _rgb(samples, value_range)
    found = samples.values.shape[2]
    if found != config.channels:
        raise BadImage(f"{found} channel{'s' * (found > 1)}, but data.channels={config.channels}")
    pixels = _mapped(samples.values, value_range)
    return np.ascontiguousarray(255 - pixels if samples.is_inverted else pixels)


def as_rgb(pixels: Pixels) -> Pixels:
    """Return a picture [H,W,C] to look at [H,W,3]: its first three channels, or the first of fewer as gray."""
    return pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)


def _by_bits(values: npt.NDArray[Any]) -> Range | None:
    """Return the range of a picture alone, of which nothing was measured: that of as many bits as it needs."""
    if values.dtype != np.uint16:
        return None
    num_bits = max(8, int(values.max()).bit_length())
    return None if num_bits == 16 else (0.0, float((1 << num_bits) - 1))


def _rgb(samples: Samples, value_range: Range | None) -> Pixels:
    if samples.num_colours not in (1, 3):
        found = samples.num_colours
        raise BadImage(f"{found} channels, which are not red, green and blue; set data.channels={found}")
    pixels = _mapped(samples.values[..., : samples.num_colours], value_range)
    if samples.is_inverted:
        pixels = 255 - pixels
    if samples.has_alpha:
        alpha = samples.values[..., samples.num_colours]
        pixels = _over_white(pixels, alpha, is_multiplied=samples.is_multiplied)
    if samples.num_colours == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(pixels)


def _mapped(values: npt.NDArray[Any], value_range: Range | None) -> Pixels:
    """Return values mapped to 0..255, cut off and rounded; what is not a number becomes 0."""
    if values.dtype == np.uint8:
        return values
    if value_range is None:
        if values.dtype != np.uint16:
            raise BadImage(f"{values.dtype} samples have no fixed range; set data.value_range=[LOW, HIGH]")
        return (values >> 8).astype(np.uint8)
    if values.dtype == np.uint16:
        return _levels(value_range)[values]
    return _scaled(values.astype(np.float32), value_range)


def _scaled(values: npt.NDArray[np.float32], value_range: Range) -> Pixels:
    low, high = value_range
    scaled = (values - np.float32(low)) * np.float32(255 / (high - low)) + np.float32(0.5)
    return np.nan_to_num(scaled, copy=False, nan=0).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=4)
def _levels(value_range: Range) -> Pixels:
    """Return the pixel of each value of 16 bits."""
    return _scaled(np.arange(1 << 16, dtype=np.float32), value_range)


def _over_white(colours: Pixels, alpha: npt.NDArray[Any], *, is_multiplied: bool) -> Pixels:
    """Lay colours over white with Pillow's rounding; alpha of a float is between 0 and 1."""
    full = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    eight_bits = alpha >> 8 if alpha.dtype == np.uint16 else alpha * np.float32(255 / full)
    opacity = eight_bits.astype(np.uint16)[..., None]
    if is_multiplied:
        return np.minimum(colours + (255 - opacity), 255).astype(np.uint8)
    mixed = colours * opacity + 255 * (255 - opacity) + 128  # at most 65,153
    return (((mixed >> 8) + mixed) >> 8).astype(np.uint8)
