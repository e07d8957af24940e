"""A contact sheet of the network's input: a few images, each beside its crops, as one PNG.

A job writes it at start. A wrong scale, swapped channels or a missing blur are then visible before an hour of
GPU time is spent. There are no files, no storage and no Ray here.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dinoray.pipeline.augment.config import CropsConfig, crop_kinds
from dinoray.pipeline.augment.multicrop import Crops
from dinoray.pipeline.figures.drawing import FAINT, INK, PAPER, RULE, draw_text, paste, png_bytes, thumbnail

# Pixels of the sheet.
_MARGIN, _GAP, _GROUP_GAP, _ROW_GAP = 24, 6, 28, 14
_SOURCE_WIDTH, _CELL = 168, 120
_TITLE_HEIGHT, _HEAD_HEIGHT, _CAPTION_HEIGHT = 34, 46, 20
_TITLE_FONT, _HEAD_FONT, _SMALL_FONT = 17, 14, 11


def contact_sheet(samples: Sequence[tuple[str, npt.NDArray[np.uint8], Crops]], config: CropsConfig) -> bytes:
    """Draw one row for each (key, image uint8 [H,W,3], its crops); return the bytes of a PNG.

    All crops are shown at one size; the column headings name the settings in which crops differ.
    """
    lefts = _column_lefts(config)
    top = _MARGIN + _TITLE_HEIGHT + _HEAD_HEIGHT
    pitch = _CELL + _CAPTION_HEIGHT + _ROW_GAP
    size = (lefts[-1] + _CELL + _MARGIN, top + pitch * len(samples) + _MARGIN - _ROW_GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_heads(draw, lefts, config, width=size[0] - 2 * _MARGIN)
    for row, (key, image, crops) in enumerate(samples):
        y = top + row * pitch
        paste(sheet, thumbnail(image, width=_SOURCE_WIDTH, height=_CELL), (_MARGIN, y))
        for left, crop in zip(lefts, [*crops.global_crops, *crops.local_crops], strict=True):
            paste(sheet, thumbnail(crop, width=_CELL, height=_CELL), (left, y))
        caption = f"{key}   {image.shape[1]} x {image.shape[0]}"
        draw_text(draw, (_MARGIN, y + _CELL + 5), caption, _SMALL_FONT, FAINT, width=size[0] - 2 * _MARGIN)
    return png_bytes(sheet)


def _column_lefts(config: CropsConfig) -> list[int]:
    """Return the left edge of each crop's column; a wider gap separates global from local crops."""
    left = _MARGIN + _SOURCE_WIDTH + _GROUP_GAP
    lefts = []
    for crop in range(config.num_global_crops + config.num_local_crops):
        if crop == config.num_global_crops:
            left += _GROUP_GAP - _GAP
        lefts.append(left)
        left += _CELL + _GAP
    return lefts


def _draw_heads(draw: ImageDraw.ImageDraw, lefts: list[int], config: CropsConfig, *, width: int) -> None:
    kind = crop_kinds(config)[0]
    shared = f"flip {kind.flip_prob:g}, jitter {kind.jitter_prob:g}, gray {kind.gray_prob:g}"
    draw_text(draw, (_MARGIN, _MARGIN - 4), f"Multi-crop: {shared}", _TITLE_FONT, INK, width=width)
    y = _MARGIN + _TITLE_HEIGHT
    draw_text(draw, (_MARGIN, y), "image", _HEAD_FONT, INK, width=_SOURCE_WIDTH)
    for left, kind in zip(lefts, crop_kinds(config), strict=True):
        draw_text(draw, (left, y), f"{kind.name}, {kind.size} px", _HEAD_FONT, INK, width=_CELL)
        settings = f"blur {kind.blur_prob:g}, solarize {kind.solarize_prob:g}"
        draw_text(draw, (left, y + 19), settings, _SMALL_FONT, FAINT, width=_CELL)
    spans = [(_MARGIN, _MARGIN + _SOURCE_WIDTH)]
    for group in (lefts[: config.num_global_crops], lefts[config.num_global_crops :]):
        spans += [(group[0], group[-1] + _CELL)] if group else []
    rule = y + _HEAD_HEIGHT - 9
    for start, end in spans:
        draw.line((start, rule, end - 1, rule), fill=RULE)
