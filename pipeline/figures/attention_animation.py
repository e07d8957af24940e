"""An animation of the teacher's attention over a run: one frame per evaluation, labelled with its step.

Evaluations write attention/step_*.png, always of the same images. The animation needs no checkpoints, because
a run keeps only its newest checkpoints. Files are local or on S3; there is no network and no Ray here.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dinoray.models.errors import DataError
from dinoray.pipeline.figures.drawing import FAINT, INK, PAPER, RULE, draw_text
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import attention_figures

_TOTAL_MS, _SHORTEST_MS, _LONGEST_MS = 12_000, 200, 1000
_REST = 3
"""Duration of the last frame, as a multiple of the other frames' duration."""
_PALETTE_FRAMES = 8
_STRIP, _MARGIN, _FONT, _STEP_WIDTH = 52, 24, 20, 150


class Frame(NamedTuple):
    """An attention sheet and the step of its evaluation."""

    step: int
    sheet: Image.Image


def read_frames(run: Directory) -> tuple[list[Frame], list[str]]:
    """Return the sheets that evaluations wrote, sorted by step, and the names of unreadable files.

    Raises DataError if a run has no sheet.
    """
    frames, damaged = [], []
    for step, name in attention_figures(run):
        try:
            sheet = Image.open(io.BytesIO(run.read(name)), formats=["PNG"])
            frames.append(Frame(step, sheet.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            damaged.append(name)
    if not frames:
        raise DataError(
            f"{run.join('attention')} holds no figure step_*.png that can be read: each evaluation of a run "
            "draws one if the backbone has a class token, trials of a study draw none; "
            "give another run directory, or leave out --animate"
        )
    return frames, damaged


def animation(frames: Sequence[Frame]) -> bytes:
    """Return an endless GIF, a format that every viewer shows; the last frame lasts longer than the others.

    The frames share one palette without dithering, so that unchanged parts do not flicker.
    """
    size = max(f.sheet.width for f in frames), max(f.sheet.height for f in frames) + _STRIP
    steps = [frame.step for frame in frames]
    drawn = [_with_step(frame, steps, size) for frame in frames]
    sample = [drawn[round(i)] for i in np.linspace(0, len(drawn) - 1, min(len(drawn), _PALETTE_FRAMES))]
    strip = Image.new("RGB", (size[0], size[1] * len(sample)))
    for number, picture in enumerate(sample):
        strip.paste(picture, (0, number * size[1]))
    palette = strip.quantize(256, Image.Quantize.MEDIANCUT)
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in drawn)
    duration = min(_LONGEST_MS, max(_SHORTEST_MS, _TOTAL_MS // len(drawn)))
    file = io.BytesIO()
    first.save(
        file,
        "GIF",
        save_all=True,
        append_images=others,
        duration=[duration] * len(others) + [_REST * duration],
        loop=0,
    )
    return file.getvalue()


def _with_step(frame: Frame, steps: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """Return the sheet above a strip that shows its step as text and as a mark on a time line."""
    picture = Image.new("RGB", size, PAPER)
    picture.paste(frame.sheet, (0, 0))
    draw = ImageDraw.Draw(picture)
    top = size[1] - _STRIP
    draw_text(draw, (_MARGIN, top + 8), f"step {frame.step}", _FONT, INK, width=_STEP_WIDTH)
    left, right, middle = _MARGIN + _STEP_WIDTH, size[0] - _MARGIN, top + 21
    length, past = right - left, max(1, steps[-1] - steps[0])
    draw.line((left, middle, right, middle), fill=RULE, width=3)
    for step in steps:
        place = left + length * (step - steps[0]) // past
        is_now, is_past = step == frame.step, step <= frame.step
        radius, colour = (7, INK) if is_now else (3, FAINT if is_past else RULE)
        draw.ellipse((place - radius, middle - radius, place + radius, middle + radius), fill=colour)
    return picture
