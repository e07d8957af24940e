"""The preprocessing of published weights, and what the scores of a start show to be wrong."""

from typing import Any

import pytest
from tiny import tiny_config

from dinoray.pipeline.augment.config import IMAGENET_MEAN, IMAGENET_STD
from dinoray.pipeline.evaluation.published import Preprocessing, published_preprocessing, start_warnings

HALF = Preprocessing("timm's data config of one", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), share=0.9)
CROPS = tiny_config().crops.model_copy(update={"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD})


def found(
    name: str, *, from_file: bool = False, pretrained: bool = False, timm: str | None = None, **crops: Any
) -> Any:
    config = tiny_config()
    backbone = config.backbone.model_copy(update={"name": name, "pretrained": pretrained})
    changed = config.model_copy(update={"backbone": backbone, "crops": CROPS.model_copy(update=crops)})
    return published_preprocessing(changed, from_file=from_file, timm_weights=timm)


def test_what_timm_publishes_has_timms_data_config() -> None:
    theirs = found("vit_tiny_patch16_224.augreg_in21k", pretrained=True)
    assert theirs[1:] == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9, "bicubic")
    assert (
        found("vit_tiny_patch16_224.augreg_in21k", from_file=True) == theirs
    )  # a file, with the tag in the name
    assert found("vit_tiny_patch16_224", timm="vit_tiny_patch16_224.augreg_in21k") == theirs
    assert theirs.cut(96) == (106, 3)  # floor(96 / 0.9); Pillow's bicubic


def test_a_file_without_a_tag_is_taken_to_expect_imagenets_mean_and_std() -> None:
    assert found("vit_tiny_patch16_224", from_file=True) is None  # which is the run's own
    theirs = found("vit_tiny_patch16_224", from_file=True, pixel_mean=(0.1, 0.1, 0.1))
    assert (theirs.mean, theirs.std, theirs.share) == (IMAGENET_MEAN, IMAGENET_STD, 224 / 256)


def test_random_weights_and_those_of_a_run_were_not_published() -> None:
    assert found("vit_tiny_patch16_224.augreg_in21k") is None
    assert found("resnet10t.c3_in1k", pretrained=True) is None  # the same mean, std, share and filter


def start(ours: float, theirs: float, *, name: str = "knn_20", **more: Any) -> dict[str, Any]:
    return {"step": 0, name: ours, f"published_{name}": theirs, "num_val": 1000, **more}


def warned(
    scores: dict[str, Any], *, published: Preprocessing | None = HALF, from_weights: bool = True
) -> list[str]:
    return list(start_warnings(scores, published, CROPS, from_weights=from_weights))


@pytest.mark.parametrize(
    ("scores", "number"),
    [
        (start(0.50, 0.60), 1),
        (start(0.60, 0.50), 1),
        (start(0.50, 0.56), 0),  # three standard errors are 6.7 points
        (start(0.50, 0.515) | {"num_val": 10**6}, 0),  # beyond noise, but little
        (start(0.50, 0.525) | {"num_val": 10**6}, 1),
        (start(20.0, 30.0, name="rankme"), 1),
        (start(25.0, 30.0, name="rankme"), 0),
        ({"step": 0, "knn_20": 0.5}, 0),
    ],
)
def test_a_warning_needs_a_large_difference(scores: dict[str, Any], number: int) -> None:
    assert len(warned(scores)) == number
    assert warned(scores, published=None) == []


def test_the_warning_has_both_numbers_and_the_settings() -> None:
    assert warned(start(0.31, 0.72)) == [
        "the initial weights score k-NN 31.0% (k=20) with this run's preprocessing and 72.0% with the published "
        "preprocessing (timm's data config of one: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, central 90%, bicubic); set "
        "crops.pixel_mean=[0.5,0.5,0.5] crops.pixel_std=[0.5,0.5,0.5], or check that the weights are the published "
        "ones, and that the images are what they expect"
    ]


def test_weights_that_only_guess_are_named() -> None:
    scores = {"step": 0, "knn_20": 0.12, "majority": 0.11, "num_val": 1000}
    (line,) = warned(scores)
    assert "k-NN 12.0% (k=20), majority guess 11.0% of 1000 images" in line
    assert warned(scores, from_weights=False) == []
    assert warned({**scores, "knn_20": 0.13}) == []
