"""Drawing of sheets: one line of text of a given width, one picture in a given box, and the sheet as PNG.

A sheet stores the boxes of its pictures, so that a page can show its text in other colours. The content of
the sheets is decided elsewhere.
"""

import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dinoray.pipeline.data.decoding.samples import as_rgb

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""
_PLACES = "pictures"
"""Key of the boxes, in `Image.info` and in the PNG file."""

PAPER, INK, FAINT, RULE = (255, 255, 255), (24, 24, 27), (113, 113, 122), (212, 212, 216)


def thumbnail(pixels: npt.NDArray[np.uint8], *, width: int, height: int) -> Image.Image:
    """Scale a picture [H,W,C] up or down to the largest size that fits into `width` x `height`, in RGB."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return Image.fromarray(as_rgb(pixels)).resize(size, Image.Resampling.BICUBIC)


def draw_text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    font_size: int,
    colour: Colour,
    *,
    width: int,
) -> None:
    """Write one line of text; omit its middle if it is longer than `width` pixels."""
    font = _font(font_size)
    # A key may hold line feeds, and surrogates that no font supports.
    text = " ".join(text.encode("utf-8", "replace").decode().splitlines())

    def shortened(kept: int) -> str:
        return f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"

    if draw.textlength(text, font=font) > width:
        fitting = bisect_right(
            range(len(text)), width, key=lambda kept: ceil(draw.textlength(shortened(kept), font=font))
        )
        text = shortened(max(0, fitting - 1))
    draw.text(corner, text, font=font, fill=colour)


def paste(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int]) -> None:
    """Paste a picture on a sheet and record its box."""
    sheet.paste(picture, corner)
    note_picture(sheet, (*corner, corner[0] + picture.width, corner[1] + picture.height))


def note_picture(sheet: Image.Image, box: Box) -> None:
    """Record that the colours in `box` must stay unchanged."""
    sheet.info.setdefault(_PLACES, []).append(box)


def png_bytes(image: Image.Image) -> bytes:
    """Return the bytes of a PNG, deterministic for a given picture; they include the boxes of pictures."""
    file, about = io.BytesIO(), PngInfo()
    if places := image.info.get(_PLACES):
        about.add_text(_PLACES, json.dumps(places))
    image.save(file, "PNG", pnginfo=about)
    return file.getvalue()


def picture_places(sheet: Image.Image) -> Sequence[Box]:
    """Return the boxes of the pictures on a sheet read from a PNG; none if the file does not store them."""
    try:
        places = json.loads(sheet.info.get(_PLACES, "[]"))
        return [(int(left), int(top), int(right), int(bottom)) for left, top, right, bottom in places]
    except (ValueError, TypeError):
        return []


def split_sheet(sheet: Image.Image) -> tuple[Image.Image, Image.Image] | None:
    """Split a sheet into two transparent layers, text and rules in ink, and pictures; None without boxes."""
    places = picture_places(sheet)
    if not places:
        return None
    pixels = np.asarray(sheet.convert("RGB"))
    is_picture = np.zeros(pixels.shape[:2], bool)
    for left, top, right, bottom in places:
        is_picture[max(0, top) : bottom, max(0, left) : right] = True
    darkness = (PAPER[0] - pixels.mean(axis=2)) / (PAPER[0] - INK[0])
    ink = np.where(is_picture, 0, (255 * darkness).round().clip(0, 255)).astype(np.uint8)
    text = np.dstack([np.full_like(ink, INK[0]), ink])
    pictures = np.dstack([np.where(is_picture[..., None], pixels, 0), 255 * is_picture]).astype(np.uint8)
    return Image.fromarray(text, "LA"), Image.fromarray(pictures, "RGBA")


@lru_cache
def _font(font_size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(font_size)
