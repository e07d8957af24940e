"""`crops.photometric=device` makes the crops that the fast kernel makes: to the level, whatever is drawn.

On a GPU the arithmetic is that of the CPU but for sums that a compiler may fuse; within a level is what is asked of it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crops_oracle import PLAIN, Pixels, cut_one, drawn_pictures, error, replays
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import jpeg, scene
from ray.data.block import BlockAccessor
from samples import write_all
from sources import source_of

from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig, crop_bytes
from dinoray.pipeline.augment.crops_table import describe_crops
from dinoray.pipeline.augment.kernels import torch_colour
from dinoray.pipeline.augment.kernels.torch_colour import adjust, finished
from dinoray.pipeline.augment.multicrop import crop_rng, cut
from dinoray.pipeline.augment.params import CropParams, OneCrop, photometric_columns, sample
from dinoray.pipeline.data.decoding.jpeg import Decoded

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def both_ways(
    image: Pixels, params: CropParams, *, device: str = "cpu"
) -> tuple[list[Pixels], list[np.ndarray]]:
    """All crops as the kernel of the config makes them, and as they are if the device makes their colours."""
    picture = Decoded(image, 1, 0.0, 0.0)
    whole = cut(picture, params)
    bare, changes = params.split_photometric()
    batch = dict(zip(("global_crops", "local_crops"), (x[None] for x in cut(picture, bare)), strict=True))
    later = photometric_columns(changes[None], params.config)
    ours = []
    for group in ("global", "local"):
        crops, values = (
            torch.tensor(x[f"{group}_{n}"][0], device=device)
            for x, n in ((batch, "crops"), (later, "photometric"))
        )
        ours += [*adjust(crops.permute(0, 3, 1, 2), values, params.config).permute(0, 2, 3, 1).cpu().numpy()]
    return [*whole.global_crops, *whole.local_crops], ours


jitters = st.permutations(["brightness", "contrast", "saturation", "hue"]).flatmap(
    lambda names: st.tuples(
        *[
            st.tuples(st.just(name), st.floats(-0.5, 0.5) if name == "hue" else st.floats(0, 3))
            for name in names
        ]
    )
)
crops = st.builds(
    OneCrop,
    *[st.just(value) for value in (0, 0, 40, 30)],
    flip=st.booleans(),
    jitter=st.tuples(jitters, st.integers(0, 4)).map(lambda drawn: drawn[0][: drawn[1]]),
    gray=st.booleans(),
    blur_sigma=st.none() | st.floats(0, 6),
    solarize=st.none() | st.integers(0, 255),
    size=st.just(17),
    vertical_flip=st.booleans(),
    quarter_turn=st.booleans(),
    stains=st.none(),
)


@settings(max_examples=40)
@given(
    crops=st.lists(crops, min_size=4, max_size=4),
    seed=st.integers(0, 99),
    contrast=st.sampled_from([0, 6, 60]),
)
def test_crops_of_any_parameters_are_the_fast_kernels(
    crops: list[OneCrop], seed: int, contrast: float
) -> None:
    rng = np.random.default_rng(seed)
    image = np.clip(rng.uniform(0, 255, 3) + contrast * rng.normal(size=(40, 30, 3)), 0, 255).astype(np.uint8)
    config = CropsConfig(
        num_local_crops=2, global_crop_size=17, local_crop_size=17, blur_sigma=(0, 6), kernel="numba"
    )
    params = CropParams(30, 40, np.empty(0), config).with_crops(crops)
    for theirs, ours in zip(*both_ways(image, params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("chunk", [1, 1 << 21])
def test_sampled_crops_are_the_fast_kernels(device: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_colour, "_MOST_PIXELS", chunk)
    config = CropsConfig(local_solarize_prob=0.3, solarize_threshold=200, kernel="numba")
    for n, image in enumerate(drawn_pictures()[:3]):
        params = sample(crop_rng(0, 0, f"picture {n}"), image.shape[1], image.shape[0], config)
        for theirs, ours in zip(*both_ways(image, params, device=device), strict=True):
            assert np.abs(ours - theirs).max() <= (0 if device == "cpu" else 1)


def test_crops_of_the_fallback_are_as_near_as_its_own_colours_are() -> None:
    errors = []
    for image, crop in replays()[2::12]:
        config = CropsConfig(
            num_global_crops=1,
            num_local_crops=1,
            global_blur_prob=(0,),
            global_solarize_prob=(0,),
            global_crop_size=crop.size,
            local_crop_size=crop.size,
            kernel="torch",
        )
        params = CropParams(image.shape[1], image.shape[0], np.empty(0), config).with_crops([crop, crop])
        errors += [error(ours, theirs) for theirs, ours in zip(*both_ways(image, params), strict=True)]
    assert 0 < np.mean(errors) < 0.6


def test_crops_that_are_large_have_an_exact_mean() -> None:
    """Their sum of luma exceeds what float32 counts: half a level less than one pixel decides how it is rounded."""
    image = np.full((600, 600, 3), 100, np.uint8)
    image[:300] = 101
    image[0, 0] = 100
    crop = PLAIN._replace(height=600, width=600, size=600, jitter=(("contrast", 1.7),))
    params = CropParams(600, 600, np.empty(0), CropsConfig(
        num_global_crops=1, num_local_crops=1, global_crop_size=600, local_crop_size=600,
        global_blur_prob=(0,), global_solarize_prob=(0,), kernel="numba",
    )).with_crops([crop, crop])  # fmt: skip
    _, ours = both_ways(image, params)
    np.testing.assert_array_equal(ours[0], cut_one(image, crop, "numba"))


@pytest.mark.parametrize("changes", [{}, {"kernel": "torch"}, {"num_local_crops": 0}])
def test_a_block_of_either_mode_is_the_same_block_once_the_device_has_finished_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    files = {f"{n}.jpg": jpeg(scene(96 + n, 64)) for n in range(6)}
    write_all(tmp_path, {**files, "3.jpg": b"no image"})
    source = source_of(str(tmp_path))
    columns = []
    for where in ("cpu", "device"):
        config = CropsConfig(
            num_global_crops=2, global_crop_size=40, local_crop_size=17, photometric=where, **changes
        )
        block = Augmenter(source, source.order(0), config, seed=3, num_threads=2).block(np.arange(12))
        carried = BlockAccessor.for_block(BlockAccessor.batch_to_arrow_block(block)).to_numpy()
        sizes = [block[name].nbytes for name in block if name.endswith(("_crops", "_photometric"))]
        assert sum(sizes) == 12 * crop_bytes(config)
        columns.append(finished(carried, config))
    cpu, device = columns
    assert cpu.keys() == device.keys()
    assert cpu["status"].sum() == device["status"].sum() > 0
    exact = changes.get("kernel") != "torch"  # OpenCV's hue is rounded in other places
    for name in cpu.keys() - {"cpu_ms", "busy_ms"} - (set() if exact else {"global_crops", "local_crops"}):
        np.testing.assert_array_equal(device[name], cpu[name])
    assert error(device["global_crops"], cpu["global_crops"]) < 1


def test_a_block_of_the_cpus_has_no_more_columns_and_the_table_says_where_it_happens() -> None:
    config = CropsConfig(photometric="device")
    assert crop_bytes(config) - crop_bytes(CropsConfig()) == 10 * 44
    assert "on the device that trains" in describe_crops(config)
    assert "device" not in describe_crops(CropsConfig())
