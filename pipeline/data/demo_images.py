"""Generate the labelled demo images, so that a first run needs no data.

Twelve classes of pattern. Colours, scale, rotation, lighting and noise are drawn independently of the class,
so only shape identifies the class. JPEG files in one folder per class, written once under the cache folder.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.storage.cache import cache_folder

VERSION = 1
NUM_TRAIN_PER_CLASS = 180
NUM_VAL_PER_CLASS = 40
_SIDE = 96
_CANVAS = 192
"""Patterns are drawn upright on a larger canvas, then rotated and scaled into the image."""

Canvas = NDArray[np.uint8]
Rng = np.random.Generator


def demo_folder() -> Path:
    """Return the folder of the demo images."""
    return cache_folder() / f"demo-v{VERSION}"


def write_demo_images(folder: Path) -> int:
    """Write `train/<class>/*.jpg` and `val/<class>/*.jpg` unless they exist; return the number of images.

    They are written to a temporary folder that is then renamed, so an interrupted first run leaves no partial
    set.
    """
    total = len(PATTERNS) * (NUM_TRAIN_PER_CLASS + NUM_VAL_PER_CLASS)
    if folder.exists():
        return total
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        _write_all(partial)
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process finished first, with the same images
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _write_all(folder: Path) -> None:
    for split, count in (("train", NUM_TRAIN_PER_CLASS), ("val", NUM_VAL_PER_CLASS)):
        for label in PATTERNS:
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                (folder / split / label / f"{label}-{i:04d}.jpg").write_bytes(
                    draw_demo_image(label, split, i)
                )


def draw_demo_image(label: str, split: str, index: int) -> bytes:
    """Return the JPEG of one image: a function of its name alone."""
    rng = np.random.default_rng([VERSION, list(PATTERNS).index(label), ("train", "val").index(split), index])
    mask = np.zeros((_CANVAS, _CANVAS), np.uint8)
    PATTERNS[label](mask, rng)
    turn = cv2.getRotationMatrix2D((_CANVAS / 2, _CANVAS / 2), rng.uniform(-12, 12), rng.uniform(0.8, 1.0))
    turn[:, 2] += (_SIDE - _CANVAS) / 2
    mask = cv2.warpAffine(mask, turn, (_SIDE, _SIDE), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    alpha = (mask.astype(np.float32) / 255)[..., None]
    ink, paper = _two_colours(rng)
    image = alpha * ink + (1 - alpha) * paper
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / _SIDE - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.15) * (x * math.cos(angle) + y * math.sin(angle))
    image = image * light[..., None] + rng.normal(0, 6, image.shape)
    ok, data = cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    if not ok:
        raise RuntimeError("OpenCV cannot encode JPEG")
    return data.tobytes()


def _two_colours(rng: Rng) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ink and paper: a light and a dark tone, in random order, with one faint tint.

    All images have about the same tones. With vivid colours, crops of one image could be matched by colour
    and a network would learn colour, which carries no information about the class.
    """
    tint = rng.normal(0, 8, 3)
    dark, light = 80 + tint + rng.normal(0, 8), 175 + tint + rng.normal(0, 8)
    ink, paper = (dark, light) if rng.random() < 0.5 else (light, dark)
    return ink.astype(np.float32), paper.astype(np.float32)


def _tiles(rng: Rng, draw: Callable[[int, int, int], object]) -> None:
    """Call `draw(x, y, size)` on a jittered grid that covers the canvas."""
    pitch = int(rng.integers(26, 40))
    for y in range(-pitch, _CANVAS + pitch, pitch):
        for x in range(-pitch, _CANVAS + pitch, pitch):
            dx, dy = rng.integers(-3, 4, 2)
            draw(x + int(dx), y + int(dy), int(pitch * rng.uniform(0.30, 0.40)))


def _stripes(mask: Canvas, rng: Rng) -> None:
    pitch = int(rng.integers(14, 26))
    for x in range(0, _CANVAS, pitch):
        cv2.rectangle(mask, (x, 0), (x + pitch // 2, _CANVAS), 255, -1)


def _zigzag(mask: Canvas, rng: Rng) -> None:
    pitch, wave = int(rng.integers(18, 28)), int(rng.integers(20, 32))
    for y in range(-wave, _CANVAS + wave, pitch):
        points = [(x, y + (wave // 2 if (x // wave) % 2 else 0)) for x in range(0, _CANVAS + wave, wave)]
        cv2.polylines(mask, [np.array(points, np.int32)], False, 255, pitch // 3, cv2.LINE_AA)


def _checks(mask: Canvas, rng: Rng) -> None:
    pitch = int(rng.integers(14, 24))
    y, x = np.mgrid[0:_CANVAS, 0:_CANVAS] // pitch
    mask[(x + y) % 2 == 0] = 255


def _lattice(mask: Canvas, rng: Rng) -> None:
    pitch, width = int(rng.integers(20, 34)), int(rng.integers(3, 6))
    for at in range(0, _CANVAS, pitch):
        cv2.line(mask, (at, 0), (at, _CANVAS), 255, width)
        cv2.line(mask, (0, at), (_CANVAS, at), 255, width)


def _bricks(mask: Canvas, rng: Rng) -> None:
    height, width = int(rng.integers(13, 20)), int(rng.integers(34, 50))
    for row, y in enumerate(range(0, _CANVAS, height)):
        for x in range(-width, _CANVAS, width):
            left = x + (width // 2 if row % 2 else 0)
            cv2.rectangle(mask, (left, y), (left + width - 4, y + height - 4), 255, -1)


def _dots(mask: Canvas, rng: Rng) -> None:
    _tiles(rng, lambda x, y, r: cv2.circle(mask, (x, y), r, 255, -1, cv2.LINE_AA))


def _rings(mask: Canvas, rng: Rng) -> None:
    _tiles(rng, lambda x, y, r: cv2.circle(mask, (x, y), r, 255, max(2, r // 3), cv2.LINE_AA))


def _crosses(mask: Canvas, rng: Rng) -> None:
    def cross(x: int, y: int, r: int) -> None:
        cv2.line(mask, (x - r, y), (x + r, y), 255, max(3, r // 2))
        cv2.line(mask, (x, y - r), (x, y + r), 255, max(3, r // 2))

    _tiles(rng, cross)


def _triangles(mask: Canvas, rng: Rng) -> None:
    def triangle(x: int, y: int, r: int) -> None:
        points = [(x, y - r), (x - r, y + r), (x + r, y + r)]
        cv2.fillPoly(mask, [np.array(points, np.int32)], 255, cv2.LINE_AA)

    _tiles(rng, triangle)


def _stars(mask: Canvas, rng: Rng) -> None:
    def star(x: int, y: int, r: int) -> None:
        points = [
            (x + (r + 3) * k * math.sin(a), y - (r + 3) * k * math.cos(a))
            for a, k in ((i * math.pi / 5, 1.0 if i % 2 == 0 else 0.4) for i in range(10))
        ]
        cv2.fillPoly(mask, [np.array(points).round().astype(np.int32)], 255, cv2.LINE_AA)

    _tiles(rng, star)


def _target(mask: Canvas, rng: Rng) -> None:
    pitch = int(rng.integers(12, 20))
    centre = tuple(int(v) for v in rng.integers(70, _CANVAS - 70, 2))
    for r in range(pitch, 2 * _CANVAS, pitch):
        cv2.circle(mask, centre, r, 255, pitch // 2 - 1, cv2.LINE_AA)


def _blobs(mask: Canvas, rng: Rng) -> None:
    noise = cv2.GaussianBlur(rng.normal(size=mask.shape).astype(np.float32), (0, 0), rng.uniform(5, 9))
    mask[noise > 0] = 255


PATTERNS: dict[str, Callable[[Canvas, Rng], None]] = {
    "blobs": _blobs,
    "bricks": _bricks,
    "checks": _checks,
    "crosses": _crosses,
    "dots": _dots,
    "lattice": _lattice,
    "rings": _rings,
    "stars": _stars,
    "stripes": _stripes,
    "target": _target,
    "triangles": _triangles,
    "zigzag": _zigzag,
}
"""Class name -> function that draws the class's pattern, upright, as white on a black canvas."""
