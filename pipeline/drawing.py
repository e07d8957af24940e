"""Text and thumbnails for drawn sheets: one line of a given width, one picture in a given box.

Knows nothing of what the sheets show.
"""

from bisect import bisect_right
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

PAPER, INK, FAINT, RULE = (255, 255, 255), (24, 24, 27), (113, 113, 122), (212, 212, 216)


def thumbnail(pixels: npt.NDArray[np.uint8], *, width: int, height: int) -> Image.Image:
    """Scale a picture [H,W,3], up or down, to the largest that fits into `width` x `height`."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def draw_text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    font_size: int,
    colour: Colour,
    *,
    width: int,
) -> None:
    """Write one line, its middle left out where it is longer than `width` pixels."""
    font = _font(font_size)
    # A key may hold line feeds, and surrogates that no font takes.
    text = " ".join(text.encode("utf-8", "replace").decode().splitlines())

    def shortened(kept: int) -> str:
        return f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"

    if draw.textlength(text, font=font) > width:
        fitting = bisect_right(
            range(len(text)), width, key=lambda kept: ceil(draw.textlength(shortened(kept), font=font))
        )
        text = shortened(max(0, fitting - 1))
    draw.text(corner, text, font=font, fill=colour)


@lru_cache
def _font(font_size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(font_size)
