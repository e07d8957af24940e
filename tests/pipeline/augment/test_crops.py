"""Multi-crop: whole crops for every image and config, equal to the chain of PIL operations they stand for."""

import itertools
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
import torch
from crops_oracle import KERNELS, PLAIN, cut_one, drawn_pictures, error, oracle_crop
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.pipeline.augment.config import CropsConfig, crop_bytes
from dinoray.pipeline.augment.crops_table import describe_crops
from dinoray.pipeline.augment.multicrop import Crops, crop_rng, cut, multi_crop
from dinoray.pipeline.augment.params import sample
from dinoray.pipeline.data.decoding.jpeg import Decoded


@KERNELS
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(["contrast", "brightness", "saturation"])))
def test_operations_run_in_the_order_of_the_paper(order: tuple[str, ...], gray: bool, kernel: str) -> None:
    image = drawn_pictures()[3]
    factors = {"contrast": 1.5, "brightness": 1.4, "saturation": 0.2}
    jitter = tuple((operation, factors[operation]) for operation in order)
    crop = PLAIN._replace(
        height=100, width=120, flip=True, jitter=jitter, gray=gray, blur_sigma=1.6, solarize=150
    )
    gate = {"numba": 0.6, "torch": 0.3}[kernel]
    assert error(cut_one(image, crop, kernel), oracle_crop(image, crop)) < gate


def test_another_process_makes_the_same_crops() -> None:
    code = (
        "import numpy as np, zlib; from dinoray.pipeline.augment.multicrop import *;"
        "from dinoray.pipeline.augment.config import *;"
        "image = np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8);"
        "crops = multi_crop(image, crop_rng(3, 1, 'k'), CropsConfig());"
        "print(zlib.crc32(crops.global_crops), zlib.crc32(crops.local_crops))"
    )
    image = np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8)
    crops = multi_crop(image, crop_rng(3, 1, "k"), CropsConfig())
    here = f"{zlib.crc32(crops.global_crops)} {zlib.crc32(crops.local_crops)}"
    assert run_python(code, PYTHONHASHSEED="1").strip() == here


def test_global_random_state_is_neither_read_nor_advanced() -> None:
    image, config = drawn_pictures()[3], CropsConfig()
    results, states = [], []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        results.append(multi_crop(image, crop_rng(0, 0, "a"), config))
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        states.append(before == after)
    assert states == [True, True]
    np.testing.assert_array_equal(results[0].global_crops, results[1].global_crops)
    np.testing.assert_array_equal(results[0].local_crops, results[1].local_crops)


# The crops of an image.


@st.composite
def configs(draw) -> CropsConfig:
    def span(low: float, high: float) -> tuple[float, float]:
        ends = sorted(draw(st.tuples(st.floats(low, high), st.floats(low, high))))
        return ends[0], ends[1]

    probability = st.floats(0, 1)
    num_global_crops = draw(st.integers(1, 3))
    per_global = st.lists(probability, min_size=num_global_crops, max_size=num_global_crops)
    return CropsConfig(
        num_global_crops=num_global_crops,
        num_local_crops=draw(st.integers(1 if num_global_crops == 1 else 0, 4)),
        global_crop_size=draw(st.integers(8, 48)),
        local_crop_size=draw(st.integers(8, 48)),
        global_crop_scale=span(0.01, 1),
        local_crop_scale=span(0.01, 1),
        aspect_ratio=span(0.1, 10),
        flip_prob=draw(probability),
        vertical_flip_prob=draw(probability),
        quarter_turn_prob=draw(probability),
        hed_jitter=draw(st.floats(0, 0.9)),
        jitter_prob=draw(probability),
        brightness=draw(st.floats(0, 3)),
        contrast=draw(st.floats(0, 3)),
        saturation=draw(st.floats(0, 3)),
        hue=draw(st.floats(0, 0.5)),
        gray_prob=draw(probability),
        global_blur_prob=tuple(draw(per_global)),
        local_blur_prob=draw(probability),
        blur_sigma=span(0, 8),
        global_solarize_prob=tuple(draw(per_global)),
        local_solarize_prob=draw(probability),
        solarize_threshold=draw(st.integers(0, 256)),
        interpolation=draw(st.sampled_from(["bicubic", "bilinear"])),
        kernel=draw(st.sampled_from(["numba", "torch"])),
    )


@settings(max_examples=150, deadline=None)
@given(config=configs(), height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 2**63))
def test_any_config_and_any_image_give_whole_crops(
    config: CropsConfig, height: int, width: int, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = image.copy()
    crops = multi_crop(image, crop_rng(seed, 0, "a"), config)
    assert_shapes(crops, config)
    assert crop_bytes(config) == crops.global_crops.nbytes + crops.local_crops.nbytes
    np.testing.assert_array_equal(image, before)
    describe_crops(config)


def assert_shapes(crops: Crops, config: CropsConfig) -> None:
    sizes = (config.global_crop_size, config.local_crop_size)
    for array, number, size in zip(
        crops, (config.num_global_crops, config.num_local_crops), sizes, strict=True
    ):
        assert array.shape == (number, size, size, 3)
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous


@KERNELS
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (20, 3000), (2, 2)])
def test_extreme_shapes_have_crops_of_the_papers_size(shape: tuple[int, int], kernel: str) -> None:
    image, config = np.full((*shape, 3), 77, np.uint8), CropsConfig(kernel=kernel)
    assert_shapes(multi_crop(image, crop_rng(0, 0, "a"), config), config)


@KERNELS
def test_crops_come_in_the_order_of_their_parameters(kernel: str) -> None:
    image, config = drawn_pictures()[3], CropsConfig(global_crop_size=32, local_crop_size=16, kernel=kernel)
    crops = multi_crop(image, crop_rng(0, 0, "a"), config)
    params = sample(crop_rng(0, 0, "a"), image.shape[1], image.shape[0], config).crops
    for crop, p in zip([*crops.global_crops, *crops.local_crops], params, strict=True):
        np.testing.assert_array_equal(crop, cut_one(image, p, kernel))


def test_the_configured_solarization_threshold_is_used() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    quiet = {"jitter_prob": 0, "gray_prob": 0, "num_local_crops": 0, "global_solarize_prob": (1, 1)}
    below = multi_crop(image, crop_rng(0, 0, "a"), CropsConfig(**quiet, solarize_threshold=101))
    at = multi_crop(image, crop_rng(0, 0, "a"), CropsConfig(**quiet, solarize_threshold=100))
    assert below.global_crops.mean() == 100
    assert at.global_crops.mean() == 155


@KERNELS
def test_a_crop_of_the_whole_image_at_its_own_size_is_a_copy(kernel: str) -> None:
    image = drawn_pictures()[2]
    crop = cut_one(image, PLAIN._replace(height=256, width=256, size=256), kernel)
    np.testing.assert_array_equal(crop, image)
    assert not np.shares_memory(crop, image)


# What has been made before, and what is made beside, changes nothing.


@lru_cache
def jobs() -> list[tuple[np.ndarray, CropsConfig]]:
    """Pictures and settings of very different sizes: the kernel's memory of one thread serves them all."""
    rng = np.random.default_rng(0)
    shapes = [(40, 60), (900, 1300), (8, 3000), (3000, 8), (1, 1), (375, 500), (33, 34)]
    settings = [(224, 96, 2.0), (17, 8, 7.5), (100, 98, 0.1), (32, 300, 1.0)]
    return [
        (
            rng.integers(0, 256, (*shape, 3), dtype=np.uint8),
            CropsConfig(
                global_crop_size=large, local_crop_size=small, blur_sigma=(sigma, sigma), num_local_crops=3,
                kernel=kernel,
            ),
        )
        for shape in shapes
        for large, small, sigma in settings
        for kernel in ("numba", "torch")
    ]  # fmt: skip


def sums(which: list[int]) -> list[int]:
    """Checksums of the crops of these jobs, made in this order."""
    results = {}
    for n in which:
        image, config = jobs()[n]
        crops = multi_crop(image, crop_rng(0, 0, str(n)), config)
        results[n] = zlib.crc32(crops.global_crops, zlib.crc32(crops.local_crops))
    return [results[n] for n in sorted(results)]


def in_a_new_thread(which: list[int]) -> list[int]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(sums, which).result()


def test_memory_that_served_another_picture_serves_the_next_like_new() -> None:
    alone = [in_a_new_thread([n])[0] for n in range(len(jobs()))]
    forward = list(range(len(jobs())))
    for order in (forward, forward[::-1], random.Random(0).sample(forward, len(forward))):
        assert in_a_new_thread(order) == alone


def test_threads_that_work_at_once_make_the_crops_that_one_makes() -> None:
    order = list(range(len(jobs())))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sums, [order, order[::-1], order, order[::-1]]))
    assert together == [sums(order)] * 4


def test_threads_are_limited_when_asked_and_not_by_import() -> None:
    code = (
        "import torch, cv2, pipeline.augment.multicrop as crops; before = torch.get_num_threads();"
        "crops.limit_threads(); print(before, torch.get_num_threads(), cv2.getNumThreads())"
    )
    assert run_python(code, OMP_NUM_THREADS="2").split() == ["2", "1", "1"]


@KERNELS
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"left": 60}, "inside 100x90"),
        ({"top": -1}, "inside 100x90"),
        ({"width": 0}, "inside 100x90"),
        ({"size": 64}, "config's size"),
    ],
    ids=str,
)
def test_parameters_that_lead_out_of_the_picture_are_refused(wrong: dict, says: str, kernel: str) -> None:
    image = np.zeros((90, 100, 3), np.uint8)
    params = sample(crop_rng(0, 0, "a"), 100, 90, CropsConfig(kernel=kernel))
    crops = list(params.crops)
    crops[3] = crops[3]._replace(**{"left": 50, "width": 50, **wrong})
    with pytest.raises(ValueError, match=f"crops\\[3\\] .*{says}"):
        cut(Decoded(image, 1, 0.0, 0.0), params.with_crops(crops))
    with pytest.raises(ValueError, match="params hold 9 crops for a config of 10"):
        cut(Decoded(image, 1, 0.0, 0.0), params.with_crops(crops[:9]))


@KERNELS
@pytest.mark.parametrize("shape", [(90, 100), (90, 100, 4), (91, 100, 3)])
def test_a_picture_of_another_shape_is_refused(shape: tuple[int, ...], kernel: str) -> None:
    params = sample(crop_rng(0, 0, "a"), 100, 90, CropsConfig(kernel=kernel))
    with pytest.raises(ValueError, match=r"uint8 \[H,W,3\]|image of 100x90"):
        cut(Decoded(np.zeros(shape, np.uint8), 1, 0.0, 0.0), params)
    with pytest.raises(ValueError, match="not float32"):
        cut(Decoded(np.zeros((90, 100, 3), np.float32), 1, 0.0, 0.0), params)


@KERNELS
def test_memory_for_crops_of_another_shape_is_refused(kernel: str) -> None:
    image, config = np.zeros((90, 100, 3), np.uint8), CropsConfig(kernel=kernel)
    params = sample(crop_rng(0, 0, "a"), 100, 90, config)
    good = cut(Decoded(image, 1, 0.0, 0.0), params)
    for bad in (
        good._replace(global_crops=good.global_crops[:, :64]),
        good._replace(local_crops=good.local_crops.astype(np.float32)),
        good._replace(local_crops=good.local_crops[:, ::-1]),
    ):
        with pytest.raises(ValueError, match="out must be uint8"):
            cut(Decoded(image, 1, 0.0, 0.0), params, bad)


def test_an_image_without_pixels_has_no_crops() -> None:
    with pytest.raises(ValueError, match="at least one pixel, not 0x5"):
        sample(crop_rng(0, 0, "a"), 0, 5, CropsConfig())
