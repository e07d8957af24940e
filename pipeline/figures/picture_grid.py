"""A sheet of small pictures with captions, alone or in pairs, as one PNG. No files, no storage and no Ray here."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dinoray.pipeline.figures.drawing import FAINT, PAPER, draw_text, paste, png_bytes, thumbnail

_CELL, _GAP, _GROUP_GAP, _CAPTION, _MARGIN, _FONT = 150, 4, 18, 22, 12, 11  # pixels
_WIDTH = 1100

Captioned = tuple[str, npt.NDArray[np.uint8]]
"""A caption, and a picture uint8 [H,W,3]."""


def picture_grid(groups: Sequence[Sequence[Captioned]]) -> bytes:
    """Draw groups of the same number of pictures, side by side in rows; return the bytes of a PNG."""
    if not groups:
        return b""
    each = max(len(group) for group in groups)
    group_width = each * (_CELL + _GAP) - _GAP + _GROUP_GAP
    per_row = max(1, min(len(groups), (_WIDTH - 2 * _MARGIN + _GROUP_GAP) // group_width))
    num_rows = -(-len(groups) // per_row)
    pitch = _CELL + _CAPTION + _GAP
    sheet = Image.new(
        "RGB", (2 * _MARGIN + per_row * group_width - _GROUP_GAP, 2 * _MARGIN + num_rows * pitch), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for number, group in enumerate(groups):
        row, column = divmod(number, per_row)
        for place, (caption, pixels) in enumerate(group):
            corner = (
                _MARGIN + column * group_width + place * (_CELL + _GAP),
                _MARGIN + row * pitch,
            )
            paste(sheet, thumbnail(pixels, width=_CELL, height=_CELL), corner)
            draw_text(draw, (corner[0], corner[1] + _CELL + 4), caption, _FONT, FAINT, width=_CELL)
    return png_bytes(sheet)
