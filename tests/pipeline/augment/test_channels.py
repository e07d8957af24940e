"""Crops of pictures that are not RGB: each channel as a gray picture has it, in both kernels and on the device."""

import numpy as np
import pytest
import torch

from dinoray.pipeline.augment.config import CropsConfig, crop_bytes
from dinoray.pipeline.augment.kernels.torch_colour import adjust
from dinoray.pipeline.augment.multicrop import Crops, crop_rng, cut
from dinoray.pipeline.augment.params import CropParams, sample
from dinoray.pipeline.data.decoding.jpeg import Decoded

SETTINGS = {"global_crop_size": 48, "local_crop_size": 24, "num_local_crops": 3}
NO_COLOURS = {"saturation": 0, "hue": 0, "gray_prob": 0}
STRONG = {"jitter_prob": 1, "global_solarize_prob": (1, 0), "local_blur_prob": 1, "local_solarize_prob": 0.5}


def config_of(channels: int, **more: object) -> CropsConfig:
    return CropsConfig.model_validate({**SETTINGS, **NO_COLOURS, **STRONG, "channels": channels, **more})


def bands(channels: int) -> np.ndarray:
    """A picture whose channels are unlike one another."""
    y, x = np.mgrid[:70, :90]
    planes = [np.sin(x / (3 + i)) * 60 + np.cos(y / (5 + i)) * 50 + 30 + 12 * i for i in range(channels)]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def params_of(config: CropsConfig) -> CropParams:
    return sample(crop_rng(0, 0, "a"), 90, 70, config)


def made(picture: np.ndarray, params: CropParams) -> Crops:
    return cut(Decoded(picture, 1, 0.0, 0.0), params)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_each_channel_is_cropped_as_a_gray_picture(kernel: str, channels: int) -> None:
    picture, params = bands(channels), params_of(config_of(channels, kernel=kernel))
    rgb = params._replace(config=config_of(3, kernel=kernel))
    crops = made(picture, params)
    assert crops.global_crops.shape == (2, 48, 48, channels)
    for i in range(channels):
        alone = made(np.repeat(picture[..., i : i + 1], 3, axis=2), rgb)
        for ours, gray in zip(crops, alone, strict=True):
            np.testing.assert_array_equal(ours[..., i], gray[..., 0])


def test_the_device_finishes_crops_of_any_channels_as_the_cpu_does() -> None:
    config = config_of(4, kernel="numba")
    picture, params = bands(4), params_of(config)
    only_cut, changes = params.split_photometric()
    expected, unfinished = made(picture, params), made(picture, only_cut)
    for crops, whole, part in (
        (unfinished.global_crops, expected.global_crops, changes[:2]),
        (unfinished.local_crops, expected.local_crops, changes[2:]),
    ):
        levels = adjust(torch.tensor(crops).permute(0, 3, 1, 2), torch.tensor(part), config)
        np.testing.assert_array_equal(levels.permute(0, 2, 3, 1).numpy(), whole)


def test_a_crop_has_as_many_bytes_as_channels() -> None:
    assert crop_bytes(config_of(4)) * 3 == crop_bytes(config_of(3)) * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hed_jitter": 0.1, "photometric": "device"}, r"hed_jitter=0.1 runs on CPUs .* set crops.photometric=cpu"),
        ({"channels": 4, **NO_COLOURS, "hed_jitter": 0.1}, r"hed_jitter=0.1 must be 0 .* set crops.hed_jitter=0"),
        ({"channels": 4}, r"saturation=0.2 and hue=0.1 and gray_prob=0.2 must be 0 with data.channels=4.*"
         "set crops.saturation=0 crops.hue=0 crops.gray_prob=0"),
        ({"channels": 4, **NO_COLOURS, "pixel_mean": [0.1, 0.2]}, "2 values for data.channels=4"),
    ],
)  # fmt: skip
def test_what_needs_red_green_and_blue_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropsConfig.model_validate(settings)


def test_a_picture_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[H,W,4\]"):
        made(bands(3), params_of(config_of(4)))
