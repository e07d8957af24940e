"""Vertical flips, quarter turns and jitter of stains in both kernels; and the crops of the recipes that use them."""

from functools import lru_cache

import numpy as np
import pytest
from crops_oracle import (
    KERNELS,
    PLAIN,
    Pixels,
    cut_one,
    drawn_pictures,
    error,
    operate,
    oracle_crop,
    oracle_stains,
)

from dinoray.jobs.cli.domain_recipes import industrial, microscopy, pathology, satellite
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.crops_table import describe_crops
from dinoray.pipeline.augment.multicrop import crop_rng
from dinoray.pipeline.augment.params import CropParams, OneCrop, sample

RECIPES = {recipe.__name__: recipe for recipe in (pathology, satellite, microscopy, industrial)}
HEMATOXYLIN = np.array([0.65, 0.70, 0.29])
UNCHANGED = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


def picture(side: int) -> Pixels:
    return drawn_pictures()[0][:side, 40 : 40 + side].copy()


@KERNELS
@pytest.mark.parametrize("size", [8, 17, 40])
def test_a_crop_is_flipped_first_and_turned_then(size: int, kernel: str) -> None:
    box = PLAIN._replace(top=11, left=5, height=90, width=60, size=size)
    plain = cut_one(picture(120), box, kernel)
    for flip, vertical, turn in np.ndindex(2, 2, 2):
        expected = plain[:, ::-1] if flip else plain
        expected = expected[::-1] if vertical else expected
        expected = np.rot90(expected) if turn else expected
        crop = box._replace(flip=bool(flip), vertical_flip=bool(vertical), quarter_turn=bool(turn))
        np.testing.assert_array_equal(cut_one(picture(120), crop, kernel), expected)


@KERNELS
def test_changed_stains_are_the_oracles(kernel: str) -> None:
    rng = np.random.default_rng(0)
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image in (picture(64), np.dstack([levels, levels.T, levels[::-1]])):
        for _ in range(4):
            changes = (*rng.uniform(0.7, 1.3, 3), *rng.uniform(-0.3, 0.3, 3))
            difference = operate(image, kernel, stains=changes).astype(int) - oracle_stains(image, changes)
            assert np.abs(difference).max() <= 1
            assert np.abs(difference).mean() < 0.1


@KERNELS
def test_more_of_a_stain_is_its_colour_with_more_density(kernel: str) -> None:
    pixel = 255 * 10 ** (-0.4 * HEMATOXYLIN)
    image = np.broadcast_to(np.round(pixel), (16, 16, 3)).astype(np.uint8)
    twice = operate(image, kernel, stains=(2.0, *UNCHANGED[1:]))
    np.testing.assert_allclose(twice[3, 4], 255 * 10 ** (-0.8 * HEMATOXYLIN), atol=1.5)
    added = operate(image, kernel, stains=(*UNCHANGED[:3], 0.4, 0.0, 0.0))
    np.testing.assert_array_equal(added, twice)


@KERNELS
def test_unchanged_stains_leave_every_level_as_it_is(kernel: str) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.dstack([levels, levels, levels])
    np.testing.assert_array_equal(operate(image, kernel, stains=UNCHANGED), image)


@lru_cache
def replays(recipe: str) -> list[tuple[Pixels, OneCrop, Pixels]]:
    config = CropsConfig.model_validate(RECIPES[recipe]()["crops"])
    return [
        (image, crop, oracle_crop(image, crop))
        for n, image in enumerate(drawn_pictures()[:2])
        for crop in sample(crop_rng(0, 0, f"{n}"), image.shape[1], image.shape[0], config).crops
    ]


@KERNELS
@pytest.mark.parametrize("recipe", RECIPES)
def test_crops_of_a_recipe_are_the_reference_chains(recipe: str, kernel: str) -> None:
    errors = [error(cut_one(image, crop, kernel), theirs) for image, crop, theirs in replays(recipe)]
    assert np.mean(errors) < {"numba": 0.3, "torch": 0.6}[kernel]
    turned = [(crop.flip, crop.vertical_flip, crop.quarter_turn) for _, crop, _ in replays(recipe)]
    assert len(set(turned)) > 4
    assert all((crop.stains is not None) == (recipe == "pathology") for _, crop, _ in replays(recipe))


def test_parameters_of_turns_and_stains_read_back_as_they_were_given() -> None:
    crop = PLAIN._replace(vertical_flip=True, quarter_turn=True, stains=(1.1, 0.9, 1.0, -0.1, 0.0, 0.2))
    assert CropParams(100, 100, np.empty(0), CropsConfig()).with_crops([crop, PLAIN]).crops == (crop, PLAIN)


def test_the_table_names_them_where_they_are_on() -> None:
    lines = describe_crops(CropsConfig(vertical_flip_prob=0.5, hed_jitter=0.05)).splitlines()
    assert lines[-1] == "vertical flip 0.5, HED jitter 0.05, 522,240 bytes an image"
