"""Pictures of where a backbone looks: one sheet for a handful of images, and overlays of each.

Images -> models/attention.py -> attention_maps.py -> here. Called by a training worker at each evaluation and by
the attention job. Knows nothing of files or Ray.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import nn

from models.attention import cls_attention, pad_to_patch, patch_size
from models.errors import ConfigError
from pipeline.augment.config import CropsConfig
from pipeline.figures.attention_maps import (
    coloured_heads,
    default_image_size,
    fit_image,
    head_colours,
    head_regions,
    heat_colours,
    masked_image,
    mass_mask,
    overlay,
    upsample,
)
from pipeline.figures.config import MASS
from pipeline.figures.drawing import (
    FAINT,
    INK,
    PAPER,
    RULE,
    draw_text,
    note_picture,
    paste,
    png_bytes,
    thumbnail,
)
from pipeline.training.step import pixels

# Pixels of the sheet.
_MARGIN, _GAP, _GROUP_GAP, _ROW_GAP = 24, 8, 24, 16
_CELL = 152
_TITLE_HEIGHT, _NOTE_HEIGHT, _HEAD_HEIGHT, _CAPTION_HEIGHT = 24, 28, 30, 18
_TITLE_FONT, _HEAD_FONT, _SMALL_FONT = 17, 14, 11
_SUMMARY_COLUMNS = 3


class Looked(NamedTuple):
    """An image [H,W,3] as the network saw it, and the class token's attention [heads,h,w] over its patches."""

    key: str
    image: npt.NDArray[np.uint8]
    attention: npt.NDArray[np.float32]
    patch: int

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """Mean over heads in pixels [H,W], smooth."""
        return self._pixels(self.attention.mean(axis=0, keepdims=True), smooth=True)[0]

    def heads(self) -> npt.NDArray[np.float32]:
        """Every head in pixels [heads,H,W], smooth."""
        return self._pixels(self.attention, smooth=True)

    def masks(self, mass: float) -> npt.NDArray[np.bool_]:
        """The patches that hold `mass` of each head, in pixels [heads,H,W]."""
        return self._pixels(mass_mask(self.attention, mass), smooth=False)

    def regions(self, mass: float) -> npt.NDArray[np.int64]:
        """The head that each pixel [H,W] belongs to, or -1."""
        return self._pixels(
            head_regions(self.attention, mass_mask(self.attention, mass))[None], smooth=False
        )[0]

    def _pixels(self, maps: npt.NDArray, *, smooth: bool) -> npt.NDArray:
        return upsample(maps, self.patch, self.image.shape[:2], smooth=smooth)


def look(
    backbone: nn.Module,
    images: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    crops: CropsConfig,
    *,
    image_size: int | None = None,
) -> Iterator[Looked]:
    """Attention of a backbone over (key, image) of any size, resized to `image_size` at the shorter side.

    One image at a time: of an image of N patches the last block forms heads * N * N probabilities.
    """
    patch = patch_size(backbone)
    size = image_size or default_image_size(crops.global_crop_size, patch)
    device = next(backbone.parameters()).device
    for key, image in images:
        fitted = fit_image(image, size)
        padded, _ = pad_to_patch(pixels(fitted[None, None], crops, device), patch)
        yield Looked(key, fitted, cls_attention(backbone, padded)[0].cpu().numpy(), patch)


def attention_figure(
    backbone: nn.Module,
    images: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    crops: CropsConfig,
    *,
    title: str = "",
    image_size: int | None = None,
) -> bytes | None:
    """The sheet for a few (key, image) as PNG; None without images or without attention of a class token.

    For use inside a run: the backbone, its modes and the random numbers of the process are as before, and where
    the GPU has no room left there is no picture rather than no run.
    """
    try:
        looked = list(look(backbone, images, crops, image_size=image_size))
    except (ConfigError, torch.OutOfMemoryError):
        return None
    return png_bytes(figure(looked, title=title)) if looked else None


def figure(looked: Sequence[Looked], *, title: str = "", mass: float = MASS) -> Image.Image:
    """A row per image: the image, the mean over heads, the heads' masks in colour, the heat of each head."""
    num_heads = len(looked[0].attention)
    lefts = _column_lefts(num_heads)
    rows = [_pictures(one, mass) for one in looked]
    heights = [
        row[0].height + (_CAPTION_HEIGHT if one.key else 0) for row, one in zip(rows, looked, strict=True)
    ]
    top = _MARGIN + _TITLE_HEIGHT + _NOTE_HEIGHT + _HEAD_HEIGHT
    bottom = top + sum(heights) + _ROW_GAP * (len(rows) - 1) + _MARGIN
    sheet = Image.new("RGB", (lefts[-1] + _CELL + _MARGIN, bottom), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_heads(sheet, draw, lefts, looked[0], title=title, mass=mass)
    for one, row, height in zip(looked, rows, heights, strict=True):
        for left, picture in zip(lefts, row, strict=True):
            paste(sheet, picture, (left + (_CELL - picture.width) // 2, top))
        caption = (lefts[0], top + row[0].height + 4)
        draw_text(draw, caption, one.key, _SMALL_FONT, FAINT, width=sheet.width - 2 * _MARGIN)
        top += height + _ROW_GAP
    return sheet


def overlays(looked: Looked, mass: float = MASS) -> dict[str, Image.Image]:
    """The pictures of one image at its own size, by name: image, mean, heads, and heat and mask of each head."""
    image = looked.image
    pictures = {
        "image": image,
        "mean": overlay(image, looked.mean),
        "heads": coloured_heads(image, looked.regions(mass), len(looked.attention)),
    }
    for number, (heat, mask) in enumerate(zip(looked.heads(), looked.masks(mass), strict=True), start=1):
        pictures[f"head_{number:02}"] = overlay(image, heat)
        pictures[f"head_{number:02}_mask"] = masked_image(image, mask)
    return {name: Image.fromarray(picture) for name, picture in pictures.items()}


def _pictures(looked: Looked, mass: float) -> list[Image.Image]:
    image = looked.image
    row = [
        image,
        overlay(image, looked.mean),
        coloured_heads(image, looked.regions(mass), len(looked.attention)),
        *(heat_colours(heat) for heat in looked.heads()),
    ]
    return [thumbnail(picture, width=_CELL, height=_CELL) for picture in row]


def _column_lefts(num_heads: int) -> list[int]:
    """Left edge of each column; the heads stand apart from what sums them up."""
    return [
        _MARGIN + column * (_CELL + _GAP) + (_GROUP_GAP - _GAP if column >= _SUMMARY_COLUMNS else 0)
        for column in range(_SUMMARY_COLUMNS + num_heads)
    ]


def _draw_heads(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, lefts: list[int], first: Looked, *, title: str, mass: float
) -> None:
    width = lefts[-1] + _CELL - _MARGIN
    y = _MARGIN - 4
    text = f"Attention of the class token{f', {title}' if title else ''}"
    draw_text(draw, (_MARGIN, y), text, _TITLE_FONT, INK, width=width)
    y += _TITLE_HEIGHT
    note = f"last block, patches of {first.patch} px; colours: the patches that hold {mass:.0%} of a head's attention"
    draw_text(draw, (_MARGIN, y), note, _SMALL_FONT, FAINT, width=width)
    y += _NOTE_HEIGHT
    colours = head_colours(len(first.attention))
    names = ["image", "mean over heads", "heads", *(f"head {n}" for n in range(1, len(colours) + 1))]
    for left, name, colour in zip(lefts, names, [None, None, None, *colours], strict=True):
        if colour:
            draw.rectangle((left, y + 3, left + 10, y + 13), fill=colour)
            note_picture(sheet, (left, y + 3, left + 11, y + 14))
        draw_text(draw, (left + (16 if colour else 0), y), name, _HEAD_FONT, INK, width=_CELL - 16)
    rule = y + _HEAD_HEIGHT - 8
    draw.line((_MARGIN, rule, lefts[2] + _CELL - 1, rule), fill=RULE)
    draw.line((lefts[3], rule, lefts[-1] + _CELL - 1, rule), fill=RULE)
