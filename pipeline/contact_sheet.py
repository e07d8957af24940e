"""A picture of what the network is fed: a few images, each beside its crops, as one PNG.

Stands beside the flow: a job draws it at start, so that a person sees a wrong scale, swapped channels or a
missing blur before an hour of GPU time is spent. Knows nothing of files, storage or Ray.
"""

import io
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipeline.crop_params import CropsConfig, crop_kinds
from pipeline.crops import Crops

# Pixels of the sheet.
_MARGIN, _GAP, _GROUP_GAP, _ROW_GAP = 24, 6, 28, 14
_SOURCE_WIDTH, _CELL = 168, 120
_TITLE_HEIGHT, _HEAD_HEIGHT, _CAPTION_HEIGHT = 34, 46, 20
_PAPER, _INK, _FAINT, _RULE = (255, 255, 255), (24, 24, 27), (113, 113, 122), (212, 212, 216)
_TITLE_FONT, _HEAD_FONT, _SMALL_FONT = 17, 14, 11


def contact_sheet(samples: Sequence[tuple[str, npt.NDArray[np.uint8], Crops]], config: CropsConfig) -> bytes:
    """Draw one row for each (key, image uint8 [H,W,3], its crops); returns the bytes of a PNG.

    All crops are shown at one size; the heads of the columns name the settings in which crops differ.
    """
    lefts = _column_lefts(config)
    top = _MARGIN + _TITLE_HEIGHT + _HEAD_HEIGHT
    pitch = _CELL + _CAPTION_HEIGHT + _ROW_GAP
    size = (lefts[-1] + _CELL + _MARGIN, top + pitch * len(samples) + _MARGIN - _ROW_GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_heads(draw, lefts, config, width=size[0] - 2 * _MARGIN)
    for row, (key, image, crops) in enumerate(samples):
        y = top + row * pitch
        sheet.paste(_thumbnail(image, width=_SOURCE_WIDTH, height=_CELL), (_MARGIN, y))
        for left, crop in zip(lefts, [*crops.global_crops, *crops.local_crops], strict=True):
            sheet.paste(_thumbnail(crop, width=_CELL, height=_CELL), (left, y))
        caption = f"{key}   {image.shape[1]} x {image.shape[0]}"
        _draw_text(draw, (_MARGIN, y + _CELL + 5), caption, _SMALL_FONT, _FAINT, width=size[0] - 2 * _MARGIN)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def _column_lefts(config: CropsConfig) -> list[int]:
    """Left edge of each crop's column; the globals and the locals stand apart."""
    left = _MARGIN + _SOURCE_WIDTH + _GROUP_GAP
    lefts = []
    for crop in range(config.num_global_crops + config.num_local_crops):
        if crop == config.num_global_crops:
            left += _GROUP_GAP - _GAP
        lefts.append(left)
        left += _CELL + _GAP
    return lefts


def _draw_heads(draw: ImageDraw.ImageDraw, lefts: list[int], config: CropsConfig, *, width: int) -> None:
    shared = f"flip {config.flip_prob:g}, jitter {config.jitter_prob:g}, gray {config.gray_prob:g}"
    _draw_text(draw, (_MARGIN, _MARGIN - 4), f"Multi-crop: {shared}", _TITLE_FONT, _INK, width=width)
    y = _MARGIN + _TITLE_HEIGHT
    _draw_text(draw, (_MARGIN, y), "image", _HEAD_FONT, _INK, width=_SOURCE_WIDTH)
    for left, kind in zip(lefts, crop_kinds(config), strict=True):
        _draw_text(draw, (left, y), f"{kind.name}, {kind.size} px", _HEAD_FONT, _INK, width=_CELL)
        settings = f"blur {kind.blur_prob:g}, solarize {kind.solarize_prob:g}"
        _draw_text(draw, (left, y + 19), settings, _SMALL_FONT, _FAINT, width=_CELL)
    spans = [(_MARGIN, _MARGIN + _SOURCE_WIDTH)]
    for group in (lefts[: config.num_global_crops], lefts[config.num_global_crops :]):
        spans += [(group[0], group[-1] + _CELL)] if group else []
    rule = y + _HEAD_HEIGHT - 9
    for start, end in spans:
        draw.line((start, rule, end - 1, rule), fill=_RULE)


def _thumbnail(pixels: npt.NDArray[np.uint8], *, width: int, height: int) -> Image.Image:
    """Scale a picture, up or down, to the largest that fits into `width` x `height`."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _draw_text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    font_size: int,
    colour: tuple[int, int, int],
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
