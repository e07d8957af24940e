"""Pictures of a backbone's attention: one sheet for a few images, and overlays of each image.

Images -> models/attention.py -> attention_maps.py -> this module. Each evaluation in a train worker and the
attention job call it. There are no files and no Ray here.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import nn

from dinoray.models.attention import cls_attention, pad_to_patch, patch_size
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.decoding.samples import as_rgb
from dinoray.pipeline.figures.attention_maps import (
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
from dinoray.pipeline.figures.config import MASS
from dinoray.pipeline.figures.drawing import (
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
from dinoray.pipeline.training.pixels import pixels

# Pixels of the sheet.
_MARGIN, _GAP, _GROUP_GAP, _ROW_GAP = 24, 8, 24, 16
_CELL = 152
_TITLE_HEIGHT, _NOTE_HEIGHT, _HEAD_HEIGHT, _CAPTION_HEIGHT = 24, 28, 30, 18
_TITLE_FONT, _HEAD_FONT, _SMALL_FONT = 17, 14, 11
_SUMMARY_COLUMNS = 3


class AttentionResult(NamedTuple):
    """The network's input [H,W,3], and the class token's attention [heads,h,w] over its patches."""

    key: str
    image: npt.NDArray[np.uint8]
    attention: npt.NDArray[np.float32]
    patch: int

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """Return the mean over heads in pixels [H,W], smooth."""
        return self._pixels(self.attention.mean(axis=0, keepdims=True), smooth=True)[0]

    def heads(self) -> npt.NDArray[np.float32]:
        """Return the attention of every head in pixels [heads,H,W], smooth."""
        return self._pixels(self.attention, smooth=True)

    def masks(self, mass: float) -> npt.NDArray[np.bool_]:
        """Return the patches that hold `mass` of each head's attention, in pixels [heads,H,W]."""
        return self._pixels(mass_mask(self.attention, mass), smooth=False)

    def regions(self, mass: float) -> npt.NDArray[np.int64]:
        """Return the head of each pixel [H,W], or -1."""
        return self._pixels(
            head_regions(self.attention, mass_mask(self.attention, mass))[None], smooth=False
        )[0]

    def _pixels(self, maps: npt.NDArray, *, smooth: bool) -> npt.NDArray:
        return upsample(maps, self.patch, self.image.shape[:2], smooth=smooth)


def compute_attention(
    backbone: nn.Module,
    images: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    crops: CropsConfig,
    *,
    image_size: int | None = None,
) -> Iterator[AttentionResult]:
    """Yield a backbone's attention over (key, image), resized to `image_size` at the shorter side.

    Images are processed one at a time: for N patches the last block forms heads * N * N probabilities.
    """
    patch = patch_size(backbone)
    size = image_size or default_image_size(crops.global_crop_size, patch)
    device = next(backbone.parameters()).device
    for key, image in images:
        fitted = fit_image(image, size)
        padded, _ = pad_to_patch(pixels(fitted[None, None], crops, device), patch)
        yield AttentionResult(key, as_rgb(fitted), cls_attention(backbone, padded)[0].cpu().numpy(), patch)


def attention_figure(
    backbone: nn.Module,
    images: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    crops: CropsConfig,
    *,
    title: str = "",
    image_size: int | None = None,
) -> bytes | None:
    """Return the sheet for a few (key, image) as PNG; None without images or without class-token attention.

    Safe inside a run: the backbone, its modes and the process's random state are left unchanged. If the GPU
    runs out of memory, the picture is omitted and the run continues.
    """
    try:
        looked = list(compute_attention(backbone, images, crops, image_size=image_size))
    except (ConfigError, torch.OutOfMemoryError):
        return None
    return png_bytes(figure(looked, title=title)) if looked else None


def figure(looked: Sequence[AttentionResult], *, title: str = "", mass: float = MASS) -> Image.Image:
    """Return one row per image: image, mean over heads, the heads' masks in colour, heat of each head."""
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


def overlays(looked: AttentionResult, mass: float = MASS) -> dict[str, Image.Image]:
    """Return the pictures of one image at its own size: image, mean, heads, heat and mask per head."""
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


def _pictures(looked: AttentionResult, mass: float) -> list[Image.Image]:
    image = looked.image
    row = [
        image,
        overlay(image, looked.mean),
        coloured_heads(image, looked.regions(mass), len(looked.attention)),
        *(heat_colours(heat) for heat in looked.heads()),
    ]
    return [thumbnail(picture, width=_CELL, height=_CELL) for picture in row]


def _column_lefts(num_heads: int) -> list[int]:
    """Return the left edge of each column; a wider gap separates the heads from the summary columns."""
    return [
        _MARGIN + column * (_CELL + _GAP) + (_GROUP_GAP - _GAP if column >= _SUMMARY_COLUMNS else 0)
        for column in range(_SUMMARY_COLUMNS + num_heads)
    ]


def _draw_heads(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    lefts: list[int],
    first: AttentionResult,
    *,
    title: str,
    mass: float,
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
