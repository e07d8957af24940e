"""Settings of the crops: wrong ones are named, and the printed table shows those in effect."""

import math

import pytest
from pydantic import ValidationError

from dinoray.pipeline.augment.config import CropsConfig, crop_bytes, crop_kinds
from dinoray.pipeline.augment.crops_table import describe_crops


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"global_crop_scale": (0.5, 0.4)}, "0 < lowest <= highest"),
        ({"local_crop_scale": (0.0, 0.4)}, "0 < lowest <= highest"),
        ({"local_crop_scale": (0.1, 1.1)}, "at most 1"),
        ({"aspect_ratio": (0.5, math.inf)}, "finite"),
        ({"blur_sigma": (-1, 2)}, "0 <= lowest <= highest"),
        ({"pixel_std": (0.2, 0.2, 0)}, "above 0"),
        ({"flip_prob": 1.1}, "less than or equal to 1"),
        ({"global_blur_prob": (1.0, -0.1)}, "greater than or equal to 0"),
        ({"brightness": math.inf}, "finite"),
        ({"hue": 0.6}, "less than or equal to 0.5"),
        ({"local_crop_size": 7}, "greater than or equal to 8"),
        ({"flip_prob": (0.5, 1.1)}, "less than or equal to 1"),
        ({"aspect_ratio": ((0.5, 1), (2, 1))}, "0 < lowest <= highest"),
        ({"blur_sigma": ((0, 1), (2, 1))}, "0 <= lowest <= highest"),
        ({"solarize_threshold": (128, 257)}, "less than or equal to 256"),
        ({"local_blur_prob": (0.5, 0.5)}, "local_blur_prob=(0.5, 0.5) has 2 values for num_local_crops=8"),
        ({"local_solarize_prob": (0.5,)}, "local_solarize_prob=(0.5,) has 1 values for num_local_crops=8"),
        ({"decode_slack": 0.9}, "greater than or equal to 1"),
        ({"num_global_crops": 3}, "global_blur_prob=(1.0, 0.1) has 2 values for num_global_crops=3"),
        ({"global_solarize_prob": (0.0,)}, "global_solarize_prob=(0.0,) has 1 values for num_global_crops=2"),
        (
            {
                "num_global_crops": 1,
                "global_blur_prob": (1,),
                "global_solarize_prob": (0,),
                "num_local_crops": 0,
            },
            "no two crops to compare",
        ),
    ],
)
def test_a_wrong_setting_is_named(changes: dict, says: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CropsConfig(**changes)
    messages = [error["msg"] for error in raised.value.errors()]  # one for each type that may stand there
    assert any(says in message for message in messages)
    assert not any("\n" in message for message in messages)


def test_default_crops_of_one_image_take_522240_bytes() -> None:
    assert crop_bytes(CropsConfig()) == 522_240


def test_the_table_shows_what_each_crop_gets() -> None:
    assert describe_crops(CropsConfig()).splitlines() == [
        "crop       size    scale        flip  jitter  gray  blur  solarize",
        "global 1   224 px  0.4 to 1     0.5   0.8     0.2   1     0",
        "global 2   224 px  0.4 to 1     0.5   0.8     0.2   0.1   0.2",
        "local 1-8  96 px   0.05 to 0.4  0.5   0.8     0.2   0.5   0",
        "jitter, in random order: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1",
        "aspect ratio 0.75 to 1.33, blur sigma 0.1 to 2 px, solarize from 128, 522,240 bytes an image",
    ]


def test_the_table_has_no_local_row_without_local_crops() -> None:
    assert "local" not in describe_crops(CropsConfig(num_local_crops=0))


def test_the_table_shows_groups_apart_where_their_strengths_differ() -> None:
    config = CropsConfig(
        num_local_crops=3,
        flip_prob=(0.5, 0.1),
        brightness=(0.4, 0.8),
        aspect_ratio=((0.5, 2), (1, 1)),
        blur_sigma=((0.1, 2), (1, 3)),
        local_blur_prob=(0.5, 0.5, 0.9),
        local_solarize_prob=0.3,
        solarize_threshold=(128, 200),
    )
    assert describe_crops(config).splitlines() == [
        "crop       size    scale        flip  jitter  gray  blur  solarize",
        "global 1   224 px  0.4 to 1     0.5   0.8     0.2   1     0",
        "global 2   224 px  0.4 to 1     0.5   0.8     0.2   0.1   0.2",
        "local 1-2  96 px   0.05 to 0.4  0.1   0.8     0.2   0.5   0.3",
        "local 3    96 px   0.05 to 0.4  0.1   0.8     0.2   0.9   0.3",
        "global crops: jitter, in random order: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1",
        "global crops: aspect ratio 0.5 to 2, blur sigma 0.1 to 2 px, solarize from 128",
        "local crops: jitter, in random order: brightness 0.8, contrast 0.4, saturation 0.2, hue 0.1",
        "local crops: aspect ratio 1 to 1, blur sigma 1 to 3 px, solarize from 200, 384,000 bytes an image",
    ]


def test_the_table_shows_blur_as_it_happens_whatever_the_polarity() -> None:
    rows = describe_crops(CropsConfig(blur_polarity="dinov2")).splitlines()
    assert [row.split()[-2] for row in rows[1:4]] == ["0", "0.9", "0.5"]


def test_one_value_stands_for_both_groups_and_for_every_crop() -> None:
    one = CropsConfig(flip_prob=0.3, aspect_ratio=(0.8, 1.2), local_blur_prob=0.4, solarize_threshold=99)
    each = CropsConfig(
        flip_prob=(0.3, 0.3),
        aspect_ratio=((0.8, 1.2), (0.8, 1.2)),
        local_blur_prob=(0.4,) * 8,
        solarize_threshold=(99, 99),
    )
    assert crop_kinds(one) == crop_kinds(each)
