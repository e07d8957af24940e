"""What will happen to each crop of an image: the config, and parameters drawn from it.

Stands before crops.py, which applies the parameters to pixels. Sampling sees an image's width and height and
a random generator, never a pixel, so distributions are tested by the million and a faster way to apply
parameters needs no second way to draw them. Knows nothing of pixels, files or Ray.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator

from models.settings import Settings

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Channels = tuple[float, float, float]
Range = tuple[float, float]


class CropsConfig(Settings):
    """How many crops of which size are cut from an image, and what is done to their pixels."""

    num_global_crops: int = Field(default=2, ge=1)
    """Large crops; student and teacher see them."""
    num_local_crops: int = Field(default=8, ge=0)
    """Small crops; only the student sees them. 0 turns multi-crop off (then widen global_crop_scale)."""
    global_crop_size: int = Field(default=224, ge=8)
    """Side of a global crop in pixels."""
    local_crop_size: int = Field(default=96, ge=8)
    """Side of a local crop in pixels."""
    global_crop_scale: Range = (0.4, 1.0)
    """Share of the image's area that a global crop covers, lowest and highest."""
    local_crop_scale: Range = (0.05, 0.4)
    """Share of the image's area that a local crop covers, lowest and highest."""
    aspect_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the region that is cut out, lowest and highest."""
    flip_prob: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: Probability = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue in a random order."""
    brightness: Strength = 0.4
    """Brightness is multiplied by a factor within 1 plus or minus this."""
    contrast: Strength = 0.4
    """Contrast is multiplied by a factor within 1 plus or minus this."""
    saturation: Strength = 0.2
    """Saturation is multiplied by a factor within 1 plus or minus this."""
    hue: float = Field(default=0.1, ge=0, le=0.5)
    """Hue is turned by up to this share of the colour circle, either way."""
    gray_prob: Probability = 0.2
    """Probability of dropping all colour."""
    global_blur_prob: tuple[Probability, ...] = (1.0, 0.1)
    """Probability that a global crop is blurred, one value per global crop."""
    local_blur_prob: Probability = 0.5
    """Probability that a local crop is blurred."""
    blur_sigma: Range = (0.1, 2.0)
    """Strength of the blur in pixels of the crop, lowest and highest."""
    global_solarize_prob: tuple[Probability, ...] = (0.0, 0.2)
    """Probability that a global crop is solarized, one value per global crop."""
    local_solarize_prob: Probability = 0.0
    """Probability that a local crop is solarized."""
    solarize_threshold: int = Field(default=128, ge=0, le=256)
    """Solarization inverts channel values from this level on (0 to 255; 256 inverts none)."""
    pixel_mean: Channels = (0.485, 0.456, 0.406)
    """Mean that the device subtracts from each channel, after scaling pixels to [0, 1]."""
    pixel_std: Channels = (0.229, 0.224, 0.225)
    """Standard deviation that the device divides each channel by."""

    @field_validator("global_crop_scale", "local_crop_scale", "aspect_ratio")
    @classmethod
    def _is_ordered_above_zero(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1] < math.inf:
            raise ValueError(f"{value} must be (lowest, highest) with 0 < lowest <= highest")
        return value

    @field_validator("global_crop_scale", "local_crop_scale")
    @classmethod
    def _is_a_share(cls, value: Range) -> Range:
        if value[1] > 1:
            raise ValueError(f"{value} are shares of the image's area: the highest must be at most 1")
        return value

    @field_validator("blur_sigma")
    @classmethod
    def _is_ordered(cls, value: Range) -> Range:
        if not 0 <= value[0] <= value[1] < math.inf:
            raise ValueError(f"{value} must be (lowest, highest) with 0 <= lowest <= highest")
        return value

    @field_validator("pixel_std")
    @classmethod
    def _can_divide(cls, value: Channels) -> Channels:
        if not all(0 < channel < math.inf for channel in value):
            raise ValueError(f"{value} must be three numbers above 0")
        return value

    @model_validator(mode="after")
    def _agrees_on_the_global_crops(self) -> "CropsConfig":
        for name in ("global_blur_prob", "global_solarize_prob"):
            values = getattr(self, name)
            if len(values) != self.num_global_crops:
                raise ValueError(
                    f"{name}={values} has {len(values)} values for num_global_crops={self.num_global_crops}; "
                    "give one per global crop"
                )
        if self.num_global_crops + self.num_local_crops < 2:
            raise ValueError(
                "num_global_crops=1 with num_local_crops=0 leaves no two crops to compare; raise either"
            )
        return self

    @property
    def crop_sizes(self) -> tuple[int, ...]:
        """Sides of the crops that are cut, the globals' first."""
        return (self.global_crop_size, self.local_crop_size)[: 2 if self.num_local_crops else 1]


class CropKind(NamedTuple):
    """Settings that differ between the crops of an image; what sampling reads and the printed table shows."""

    name: str
    size: int
    scale: Range
    blur_prob: float
    solarize_prob: float


class CropParams(NamedTuple):
    """All that happens to one crop. The box is in pixels of the decoded image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    """(operation, factor) in the order of application; empty for an unjittered crop."""
    gray: bool
    blur_sigma: float | None
    solarize: bool


def crop_kinds(config: CropsConfig) -> list[CropKind]:
    """One entry per crop of an image: the global crops, then the local ones."""
    globals_ = [
        CropKind(
            f"global {g + 1}", config.global_crop_size, config.global_crop_scale, blur_prob, solarize_prob
        )
        for g, (blur_prob, solarize_prob) in enumerate(
            zip(config.global_blur_prob, config.global_solarize_prob, strict=True)
        )
    ]
    locals_ = [
        CropKind(
            f"local {i + 1}",
            config.local_crop_size,
            config.local_crop_scale,
            config.local_blur_prob,
            config.local_solarize_prob,
        )
        for i in range(config.num_local_crops)
    ]
    return globals_ + locals_


_TRIES = 10
# Each crop owns a fixed row of uniform numbers, whether it uses them or not. So a changed probability,
# strength or number of crops leaves every other draw as it was.
_UNIFORMS = 2 * _TRIES + 13
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_ORDERS = tuple(itertools.permutations(_OPERATIONS))


def sample_crops(rng: np.random.Generator, width: int, height: int, config: CropsConfig) -> list[CropParams]:
    """Draw the parameters of every crop of a `width` x `height` image, in the order of `crop_kinds`."""
    kinds = crop_kinds(config)
    rows: list[list[float]] = rng.random((len(kinds), _UNIFORMS)).tolist()
    return [_sample_crop(row, width, height, kind, config) for row, kind in zip(rows, kinds, strict=True)]


def _sample_crop(
    uniforms: Sequence[float], width: int, height: int, kind: CropKind, config: CropsConfig
) -> CropParams:
    box_uniforms, rest = uniforms[: 2 * _TRIES + 2], uniforms[2 * _TRIES + 2 :]
    flip, jitter, order, *operations, gray, blur, sigma, solarize = rest
    return CropParams(
        *_sample_box(box_uniforms, width, height, scale=kind.scale, aspect_ratio=config.aspect_ratio),
        flip=flip < config.flip_prob,
        jitter=_sample_jitter(order, operations, config) if jitter < config.jitter_prob else (),
        gray=gray < config.gray_prob,
        blur_sigma=_between(config.blur_sigma, sigma) if blur < kind.blur_prob else None,
        solarize=solarize < kind.solarize_prob,
    )


def _sample_box(
    uniforms: Sequence[float], width: int, height: int, *, scale: Range, aspect_ratio: Range
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a region, as torchvision's RandomResizedCrop does.

    Area is uniform in `scale`, aspect ratio log-uniform; ten tries to fit inside the image, then the largest
    centred region of an allowed aspect ratio. Every image of at least one pixel has an answer.
    """
    low, high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    for area_uniform, aspect_uniform in zip(uniforms[:_TRIES], uniforms[_TRIES : 2 * _TRIES], strict=True):
        area = width * height * _between(scale, area_uniform)
        aspect = math.exp(_between((low, high), aspect_uniform))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(uniforms[2 * _TRIES] * (height - box_height + 1))
            left = int(uniforms[2 * _TRIES + 1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_width = max(1, min(width, round(height * aspect_ratio[1])))
    box_height = max(1, min(height, round(width / aspect_ratio[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _sample_jitter(
    order: float, uniforms: Sequence[float], config: CropsConfig
) -> tuple[tuple[str, float], ...]:
    """Draw (operation, factor) in one of the 24 orders; an operation of strength 0 is left out."""
    spans = {
        "brightness": (max(0.0, 1 - config.brightness), 1 + config.brightness),
        "contrast": (max(0.0, 1 - config.contrast), 1 + config.contrast),
        "saturation": (max(0.0, 1 - config.saturation), 1 + config.saturation),
        "hue": (-config.hue, config.hue),
    }
    factors = {name: _between(spans[name], u) for name, u in zip(_OPERATIONS, uniforms, strict=True)}
    operations = _ORDERS[int(order * len(_ORDERS))]
    return tuple((name, factors[name]) for name in operations if spans[name][0] < spans[name][1])


def _between(span: Range, uniform: float) -> float:
    return span[0] + uniform * (span[1] - span[0])
