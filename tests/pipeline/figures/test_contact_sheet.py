"""The contact sheet: every picture where its head says, whatever the shapes, sizes and keys."""

import io

import numpy as np
import pytest
from PIL import Image

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import Crops, crop_rng, multi_crop
from dinoray.pipeline.figures.contact_sheet import contact_sheet


def flat(level: int, *shape: int) -> np.ndarray:
    return np.full((*shape, 3), level, np.uint8)


def read(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def test_a_row_shows_the_image_then_global_then_local_crops() -> None:
    config = CropsConfig(num_local_crops=3, global_crop_size=32, local_crop_size=16)
    crops = Crops(
        np.stack([flat(level, 32, 32) for level in (40, 60)]),
        np.stack([flat(level, 16, 16) for level in (80, 100, 120)]),
    )
    sheet = read(contact_sheet([("a.jpg", flat(20, 50, 70), crops)], config))
    row = sheet[-80, :, 0]  # a line through the pictures: runs of one level, on white
    starts = [int(np.argmax(row == level)) for level in (20, 40, 60, 80, 100, 120)]
    widths = [int(np.sum(row == level)) for level in (40, 60, 80, 100, 120)]
    assert starts == sorted(starts)
    assert len(set(widths)) == 1
    assert widths[0] > 90
    # The two kinds of crops stand farther apart than crops of one kind.
    gap, wide_gap = starts[2] - starts[1] - widths[0], starts[3] - starts[2] - widths[0]
    assert wide_gap > 2 * gap > 0


def test_each_sample_has_a_row() -> None:
    config = CropsConfig(global_crop_size=16, local_crop_size=8)
    image = flat(90, 30, 40)
    sample = ("a.jpg", image, multi_crop(image, crop_rng(0, 0, "a"), config))
    heights = [len(read(contact_sheet([sample] * number, config))) for number in (1, 2, 5)]
    assert (heights[2] - heights[0]) == 4 * (heights[1] - heights[0]) > 0


def test_the_heads_tell_settings_apart() -> None:
    image = flat(90, 30, 40)
    shared = {"global_crop_size": 16, "local_crop_size": 8}
    sheets = []
    for config in (CropsConfig(**shared), CropsConfig(**shared, global_blur_prob=(0.1, 1.0))):
        crops = Crops(flat(50, 2, 16, 16), flat(50, 8, 8, 8))
        sheets.append(read(contact_sheet([("a.jpg", image, crops)], config)))
    assert sheets[0].shape == sheets[1].shape
    assert (sheets[0] != sheets[1]).any()


@pytest.mark.parametrize(
    "key", ["", "long/" * 300 + ".jpg", "line\nfeed\r.jpg", "caf\udce9.jpg", "写真/été.jpg"]
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (30, 40)])
def test_any_key_and_any_shape_can_be_drawn(key: str, shape: tuple[int, int]) -> None:
    config = CropsConfig(num_local_crops=0, global_crop_size=16)
    image = flat(90, *shape)
    short = read(contact_sheet([("a", image, multi_crop(image, crop_rng(0, 0, ""), config))], config))
    sheet = read(contact_sheet([(key, image, multi_crop(image, crop_rng(0, 0, key), config))], config))
    assert sheet.shape == short.shape
    assert (sheet[:, -20:] == 255).all()  # the margin: nothing runs out of the picture
