"""Attention maps: masks by a naive twin, pixels where their patches are, and sheets that hold what they say."""

import io
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given
from PIL import Image
from tiny import TINY_RESNET, tiny_config
from torch import nn

from dinoray.models.backbone import build_backbone
from dinoray.pipeline.augment.config import CropsConfig
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
from dinoray.pipeline.figures.attention_sheet import (
    AttentionResult,
    attention_figure,
    compute_attention,
    figure,
    overlays,
)
from dinoray.pipeline.figures.drawing import picture_places, png_bytes
from dinoray.pipeline.training.config import DINOConfig

CROPS = tiny_config().crops


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def looked(
    height: int = 16, width: int = 24, *, heads: int = 2, key: str = "a.jpg", seed: int = 0
) -> AttentionResult:
    """An image of patches of 4 px, and any attention."""
    grid = -(-height // 4), -(-width // 4)
    attention = np.random.default_rng(seed).dirichlet(np.ones(grid[0] * grid[1]), heads)
    return AttentionResult(
        key, noise(height, width, seed), attention.reshape(heads, *grid).astype(np.float32), 4
    )


# Masks


def naive_mask(weights: list[int], mass: Fraction) -> list[bool]:
    """Take the largest left, the first of equals, until enough is held: exact, in whole numbers."""
    taken = [False] * len(weights)
    while sum(w for w, t in zip(weights, taken, strict=True) if t) < mass * sum(weights):
        left = [i for i, t in enumerate(taken) if not t]
        taken[max(left, key=lambda i: (weights[i], -i))] = True
    return taken


@given(
    heads=st.lists(st.lists(st.integers(0, 6), min_size=6, max_size=6), min_size=1, max_size=3),
    sixteenths=st.integers(0, 16),
)
@example(heads=[[1, 1, 1, 1, 1, 1]], sixteenths=8)
@example(heads=[[0, 0, 0, 0, 0, 0]], sixteenths=16)
def test_masks_equal_those_of_the_naive_twin(heads: list[list[int]], sixteenths: int) -> None:
    maps = np.array(heads, np.float32).reshape(-1, 2, 3)  # small integers and binary shares: no rounding
    masks = mass_mask(maps, sixteenths / 16)
    assert masks.shape == maps.shape
    assert masks.dtype == bool
    for mask, head in zip(masks, heads, strict=True):
        assert mask.ravel().tolist() == naive_mask(head, Fraction(sixteenths, 16))


def test_a_mask_holds_the_mass_and_none_of_its_patches_can_be_spared() -> None:
    maps = looked(40, 40, heads=5).attention
    for mask, head in zip(mass_mask(maps, 0.6), maps.astype(np.float64), strict=True):
        assert head[mask].sum() >= 0.6 * head.sum()
        assert head[mask].sum() - head[mask].min() < 0.6 * head.sum()
        assert head[mask].min() >= head[~mask].max()


def test_the_mask_of_even_attention_is_the_first_patches() -> None:
    assert mass_mask(np.full((1, 2, 5), 0.0625))[0].tolist() == [[True] * 5, [True] + [False] * 4]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_attention_that_is_nothing_has_an_empty_mask_and_a_dark_picture(value: float) -> None:
    maps = np.full((1, 3, 3), value, np.float32)
    assert not mass_mask(maps).any()
    assert (heat_colours(maps[0]) == heat_colours(np.zeros((3, 3)))).all()


# Pixels


@given(height=st.integers(1, 30), width=st.integers(1, 30), patch=st.integers(1, 9))
def test_every_pixel_of_a_sharp_map_has_the_value_of_its_patch(height: int, width: int, patch: int) -> None:
    grid = -(-height // patch), -(-width // patch)
    maps = np.arange(2 * grid[0] * grid[1]).reshape(2, *grid)
    pixels = upsample(maps, patch, (height, width), smooth=False)
    y, x = np.mgrid[:height, :width]
    assert (pixels == maps[:, y // patch, x // patch]).all()


def test_a_smooth_map_peaks_in_the_middle_of_the_patch_and_is_never_negative() -> None:
    maps = np.zeros((2, 5, 6), np.float32)
    maps[0, 1, 4] = maps[1, 3, 1] = 1
    smooth = upsample(maps, 9, (41, 50), smooth=True)
    assert smooth.shape == (2, 41, 50)
    assert [np.unravel_index(m.argmax(), m.shape) for m in smooth] == [(13, 40), (31, 13)]
    assert smooth.min() == 0
    assert upsample(np.full((1, 3, 3), 0.25, np.float32), 8, (24, 24), smooth=True) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("crop", "patch", "size"),
    [
        (224, 16, 480),
        (224, 8, 448),
        (224, 14, 448),
        (64, 16, 256),
        (96, 16, 384),
        (64, 8, 240),
        (518, 14, 1036),
    ],
)
def test_images_are_looked_at_in_two_to_four_times_the_crop(crop: int, patch: int, size: int) -> None:
    assert default_image_size(crop, patch) == size


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((50, 100), (48, 96)),
        ((100, 50), (96, 48)),
        ((30, 30), (48, 48)),
        ((10, 100), (19, 192)),
        ((1, 5000), (1, 192)),
    ],
)
def test_an_image_keeps_its_aspect_and_a_strip_does_not_grow(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit_image(noise(*shape), 48).shape == (*expected, 3)


def test_heat_goes_from_dark_at_zero_to_bright() -> None:
    light = heat_colours(np.linspace(0, 0.3, 9)[None] ** 4)[0].astype(int).sum(axis=1)
    assert (np.diff(light[3:]) > 0).all()
    assert light[0] < 40
    assert light[-1] > 550


def test_heat_is_warm() -> None:
    red, green, blue = heat_colours(np.linspace(0, 1, 100)[None] ** 4)[0, 92].astype(int)
    assert red > green > blue


def test_even_attention_looks_even_and_dim_however_small_its_differences() -> None:
    even = heat_colours(np.array([[0.25, 0.2501, 0.2499, 0.25]]))[0].astype(int)
    assert np.ptp(even, axis=0).max() <= 8
    assert 100 < even.sum(axis=1).min() <= even.sum(axis=1).max() < 350


def test_one_patch_that_takes_nearly_all_leaves_the_others_visible() -> None:
    heat = np.tile(np.linspace(0, 1, 20) ** 4, (20, 1))
    expected = heat_colours(heat)
    heat[3, 3] = 1.5
    shown = heat_colours(heat)
    assert (shown[3, 3] == expected[0, -1]).all()
    shown[3, 3] = expected[3, 3]
    assert (shown == expected).all()
    alone = np.zeros((20, 20))
    alone[3, 3] = 0.9
    assert heat_colours(alone)[3, 3].sum(dtype=int) > 550


def test_an_overlay_is_the_dim_gray_image_where_there_is_no_heat() -> None:
    heat = np.zeros((8, 8))
    heat[:, 4:] = 1
    picture = overlay(np.full((8, 8, 3), 100, np.uint8), heat).astype(int)
    assert (picture[:, :4] == 60).all()
    assert (abs(picture[:, 4:] - heat_colours(heat)[:, 4:]) <= 30).all()


def test_a_masked_image_shows_the_mask_alone() -> None:
    image, mask = noise(6, 7), np.random.default_rng(1).random((6, 7)) < 0.5
    picture = masked_image(image, mask)
    assert (picture[mask] == image[mask]).all()
    assert picture[~mask].max() <= 63
    assert (picture[~mask][:, 0] == picture[~mask][:, 2]).all()


@pytest.mark.parametrize("num_heads", [1, 3, 6, 12, 16])
def test_heads_have_colours_of_their_own(num_heads: int) -> None:
    colours = np.array(head_colours(num_heads), int)
    apart = [abs(a - b).sum() for i, a in enumerate(colours) for b in colours[:i]]
    assert min(apart, default=99) > 40


def test_a_patch_belongs_to_the_head_that_gives_it_most_of_its_attention() -> None:
    attention = np.array([[[0.1, 0.1, 0.2]], [[0.01, 0.03, 0.0]]])  # shares: .25 .25 .5 and .25 .75 0
    masks = np.array([[[True, True, False]], [[True, True, False]]])
    assert head_regions(attention, masks).tolist() == [[0, 1, -1]]
    masks[1] = False
    assert head_regions(attention, masks).tolist() == [[0, 0, -1]]


def test_regions_are_tinted_in_the_colour_of_their_head() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    picture = coloured_heads(image, np.array([[0, 1, -1]]), 2)[0].astype(int)
    for pixel, colour in zip(picture, head_colours(2), strict=False):
        assert abs(pixel - (45 + 0.55 * np.array(colour))).max() <= 1
    assert picture[2].tolist() == [45, 45, 45]


# Networks


def backbone(**changes: dict) -> nn.Module:
    config: DINOConfig = tiny_config(**changes)
    torch.manual_seed(0)
    return build_backbone(config.backbone, crop_sizes=config.crops.crop_sizes, drop_path_rate=0.0)


def test_images_of_any_size_get_a_value_for_every_patch_of_them() -> None:
    sizes = [(16, 16), (50, 30), (9, 9), (1, 200)]
    found = list(compute_attention(backbone(), [(str(s), noise(*s)) for s in sizes], CROPS, image_size=30))
    assert [one.key for one in found] == [str(s) for s in sizes]
    assert [one.image.shape[:2] for one in found] == [(30, 30), (50, 30), (30, 30), (1, 120)]
    assert [one.attention.shape for one in found] == [(2, 8, 8), (2, 13, 8), (2, 8, 8), (2, 1, 30)]
    for one in found:
        assert 0.5 < one.attention.sum(axis=(1, 2)).min() <= one.attention.sum(axis=(1, 2)).max() < 1
        assert one.mean.shape == one.image.shape[:2]
        assert one.heads().shape == one.masks(0.6).shape == (2, *one.image.shape[:2])


def test_pixels_are_normalised_as_in_training() -> None:
    image = noise(16, 16)
    seen = []
    model = backbone()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    crops = CROPS.model_copy(update={"pixel_mean": (0.1, 0.2, 0.3), "pixel_std": (0.5, 0.25, 1.0)})
    list(compute_attention(model, [("a", image)], crops, image_size=16))
    expected = (image / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_the_figure_inside_a_run_changes_nothing_and_is_the_same_twice() -> None:
    model = backbone(backbone={"drop_path_rate": 0.5}).train()
    images = [("a.jpg", noise(20, 30)), ("b.jpg", noise(30, 20))]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    figures = [attention_figure(model, images, CROPS, title="step 3") for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in model.modules())
    assert figures[0] is not None
    assert figures[0] == figures[1]
    assert Image.open(io.BytesIO(figures[0])).format == "PNG"


def test_there_is_no_figure_without_class_attention_or_without_images() -> None:
    assert attention_figure(backbone(backbone=TINY_RESNET), [("a", noise(20, 20))], CROPS) is None
    assert attention_figure(backbone(), [], CROPS) is None


# Sheets


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_sheet_shows_image_mean_heads_and_then_each_head() -> None:
    one = looked(16, 16, heads=3, key="")
    sheet = np.asarray(figure([one]))
    rows = np.flatnonzero((sheet[:, :, 0] != 255).sum(axis=1) > 500)
    bottom = rows.max()
    line = (sheet[bottom - 40] != 255).any(axis=1)  # through the pictures
    starts = np.flatnonzero(line & ~np.r_[False, line[:-1]])
    ends = np.flatnonzero(line & ~np.r_[line[1:], False]) + 1
    assert len(starts) == 6
    assert set(ends - starts) == {152}
    gaps = starts[1:] - ends[:-1]
    assert gaps[2] > 2 * gaps[0]
    assert len(set(np.delete(gaps, 2))) == 1
    expected = np.asarray(Image.fromarray(one.image).resize((152, 152), Image.Resampling.BICUBIC))
    assert (sheet[bottom - 151 : bottom + 1, starts[0] : ends[0]] == expected).all()
    for start, end, heat in zip(starts[3:], ends[3:], one.heads(), strict=True):
        expected = np.asarray(
            Image.fromarray(heat_colours(heat)).resize((152, 152), Image.Resampling.BICUBIC)
        )
        assert (sheet[bottom - 151 : bottom + 1, start:end] == expected).all()
    swatches = [tuple(map(int, c)) for c in np.unique(sheet[: bottom - 151].reshape(-1, 3), axis=0)]
    assert set(head_colours(3)) <= set(swatches)


def test_a_sheet_has_a_row_for_each_image_and_a_column_for_each_head() -> None:
    def size(*shapes: tuple[int, int], heads: int = 2) -> tuple[int, int]:
        return figure([looked(*shape, heads=heads) for shape in shapes]).size

    square, twice, flat = size((16, 16)), size((16, 16), (16, 16)), size((16, 16), (16, 32))
    assert square[0] == twice[0] == flat[0]
    assert twice[1] - square[1] > flat[1] - square[1] > 76
    widths = [size((16, 16), heads=heads)[0] for heads in (1, 2, 12)]
    assert widths[2] - widths[1] == 10 * (widths[1] - widths[0]) > 0


@pytest.mark.parametrize("key", ["", "long/" * 300, "line\nfeed", "caf\udce9.jpg", "写真/été.jpg"])
def test_any_key_and_title_stay_inside_the_sheet(key: str) -> None:
    sheet = np.asarray(figure([looked(key=key)], title=key))
    assert (sheet[:, -20:] == 255).all()


def test_the_title_and_the_mass_are_on_the_sheet() -> None:
    sheets = [
        png_bytes(figure([looked(key="")], title=title, mass=mass))
        for title, mass in (("", 0.6), ("step 1", 0.6), ("", 1.0))
    ]
    tops = [read(sheet)[:60] for sheet in sheets]
    assert (tops[0] != tops[1]).any()
    assert (tops[0] != tops[2]).any()


def test_the_bytes_of_a_sheet_are_a_function_of_what_it_shows() -> None:
    assert png_bytes(figure([looked()])) == png_bytes(figure([looked()]))
    assert png_bytes(figure([looked()])) != png_bytes(figure([looked(seed=1)]))


def test_a_sheet_keeps_the_places_of_its_pictures_and_all_else_is_gray() -> None:
    sheet = Image.open(
        io.BytesIO(png_bytes(figure([looked(20, 40, heads=2), looked(seed=1)], title="step 1")))
    )
    pixels, places = np.array(sheet), picture_places(sheet)
    assert len(places) == 2 * 5 + 2  # two swatches
    for left, top, right, bottom in places:
        assert (pixels[top:bottom, left:right] != 255).any()
        pixels[top:bottom, left:right] = 255
    assert (np.ptp(pixels.astype(int), axis=2) < 16).all()
    assert picture_places(Image.new("RGB", (4, 4))) == []


def test_overlays_are_the_size_of_the_image() -> None:
    pictures = overlays(looked(18, 22, heads=2))
    assert list(pictures) == ["image", "mean", "heads", "head_01", "head_01_mask", "head_02", "head_02_mask"]
    assert {picture.size for picture in pictures.values()} == {(22, 18)}


def test_crops_of_the_config_decide_the_size() -> None:
    crops = CropsConfig(global_crop_size=16, local_crop_size=8)
    (one,) = compute_attention(backbone(), [("a", noise(40, 40))], crops)
    assert one.image.shape == (64, 64, 3)
