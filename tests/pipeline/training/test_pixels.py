"""The conversion of a GPU, run on a CPU, against the plain one: one kernel, other memory format, same values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.training.pixels import normalised, pixels

CPU = torch.device("cpu")
EVERY_BYTE = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 1, 16, 16, 3)


def per_byte(values: tuple[float, ...]) -> torch.Tensor:
    return 255 * torch.tensor(values).view(3, 1, 1)


def on_a_gpu(crops: torch.Tensor, config: CropsConfig, dtype: torch.dtype) -> torch.Tensor:
    return normalised(crops, per_byte(config.pixel_mean), per_byte(config.pixel_std), dtype)


@given(
    images=st.integers(1, 3),
    crops=st.integers(0, 4),
    sides=st.sampled_from([(4, 4), (3, 5)]),
    part=st.booleans(),
)
def test_crops_are_ordered_and_normalised_as_on_a_cpu(
    images: int, crops: int, sides: tuple[int, int], part: bool
) -> None:
    rng = torch.Generator().manual_seed(images)
    batch = torch.randint(0, 256, (images, crops, *sides, 3), dtype=torch.uint8, generator=rng)
    batch = batch[::2] if part else batch  # a microbatch is every so many rows
    config = CropsConfig()
    ours = on_a_gpu(batch, config, torch.float32)
    torch.testing.assert_close(ours, pixels(batch, config, CPU), rtol=0, atol=5e-7)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mean", [(0.485, 0.456, 0.406), (0.0, 0.5, 1.0)])
def test_bfloat16_is_within_its_rounding_of_the_float_for_every_byte(mean: tuple[float, ...]) -> None:
    config = CropsConfig(pixel_mean=mean)
    exact = pixels(EVERY_BYTE, config, CPU).double()
    ours = on_a_gpu(EVERY_BYTE, config, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
