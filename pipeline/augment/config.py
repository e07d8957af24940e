"""Settings of multi-crop: number and size of the crops, and the changes to their pixels.

This module stands before params.py, which draws the parameters of each crop of one image. It uses no pixels,
random numbers, files or Ray.
"""

import math
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import Field, field_validator, model_validator

from dinoray.models.settings import Auto, Settings

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Turn = Annotated[float, Field(ge=0, le=0.5)]
Level = Annotated[int, Field(ge=0, le=256)]
Channels = tuple[float, ...]
Range = tuple[float, float]

Value = TypeVar("Value")

OF_COLOURS = ("saturation", "hue", "gray_prob", "hed_jitter")
"""Settings of what only RGB has."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CropsConfig(Settings):
    """Multi-crop: number and size of the crops of an image, and the augmentation of their pixels.

    A setting with two values applies the first to the global crops and the second to the local crops.
    """

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
    aspect_ratio: Range | tuple[Range, Range] = (3 / 4, 4 / 3)
    """Width over height of the region that is cut out, lowest and highest; or such a pair for either group of crops."""
    flip_prob: Probability | tuple[Probability, Probability] = 0.5
    """Probability of a horizontal flip; one value, or one for global and one for local crops."""
    vertical_flip_prob: Probability = 0.0
    """Probability of a vertical flip, for images without an up and a down."""
    quarter_turn_prob: Probability = 0.0
    """Probability of a turn by 90 degrees; with 0.5 here and for both flips, all eight orientations are as frequent."""
    hed_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """H&E slides: each stain is multiplied by 1 plus or minus up to this, and shifted by up to this optical density."""
    jitter_prob: Probability | tuple[Probability, Probability] = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue in a random order; one value or two."""
    brightness: Strength | tuple[Strength, Strength] = 0.4
    """Brightness is multiplied by a factor within 1 plus or minus this; one value, or global and local."""
    contrast: Strength | tuple[Strength, Strength] = 0.4
    """Contrast is multiplied by a factor within 1 plus or minus this; one value, or global and local."""
    saturation: Strength | tuple[Strength, Strength] = 0.2
    """Saturation is multiplied by a factor within 1 plus or minus this; one value, or global and local."""
    hue: Turn | tuple[Turn, Turn] = 0.1
    """Hue is turned by up to this share of the colour circle, either way; one value, or global and local."""
    gray_prob: Probability | tuple[Probability, Probability] = 0.2
    """Probability of conversion to gray; one value, or global and local."""
    global_blur_prob: tuple[Probability, ...] = (1.0, 0.1)
    """Probability that a global crop is blurred, one value per global crop."""
    local_blur_prob: Probability | tuple[Probability, ...] = 0.5
    """Probability that a local crop is blurred; one value, or one per local crop."""
    blur_polarity: Literal["dino", "dinov2"] = "dino"
    """Meaning of the blur probabilities: to blur, or (as in the published code of DINOv2) not to blur."""
    blur_sigma: Range | tuple[Range, Range] = (0.1, 2.0)
    """Strength of the blur in pixels of the crop, lowest and highest; or such a pair for either group of crops."""
    global_solarize_prob: tuple[Probability, ...] = (0.0, 0.2)
    """Probability that a global crop is solarized, one value per global crop."""
    local_solarize_prob: Probability | tuple[Probability, ...] = 0.0
    """Probability that a local crop is solarized; one value, or one per local crop."""
    solarize_threshold: Level | tuple[Level, Level] = 128
    """Solarization inverts channel values from this level on (0 to 255; 256 inverts none); one value or two."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter that resizes a region to its crop; both are antialiased."""
    decode_slack: float = Field(default=1.25, ge=1)
    """A JPEG is decoded at 1/2, 1/4 or 1/8 if each region then still has this many pixels to one of its crop's side."""
    kernel: Literal["auto", "numba", "torch"] = "auto"
    """Code that makes the crops: numba (fast, compiled at first use), or torch and OpenCV; auto: numba if installed."""
    photometric: Literal["cpu", "device"] = "cpu"
    """Where jitter, grayscale, blur and solarization run: with the crops on CPUs, or on the device that trains."""
    channels: int = Field(default=3, ge=1, le=16)
    """Channels of a crop; it follows data.channels."""
    pixel_mean: Channels | Auto = IMAGENET_MEAN
    """Mean that is subtracted from each channel in [0, 1]; auto, and the default for more than 8 bits: measured."""
    pixel_std: Channels | Auto = IMAGENET_STD
    """Standard deviation that each channel is divided by; auto, and the default for more than 8 bits: measured."""

    @field_validator("global_crop_scale", "local_crop_scale", "aspect_ratio")
    @classmethod
    def _is_ordered_above_zero(cls, value: Range | tuple[Range, Range]) -> Range | tuple[Range, Range]:
        if not all(0 < low <= high < math.inf for low, high in _ranges(value)):
            raise ValueError(
                f"{value} must be (lowest, highest) with 0 < lowest <= highest, e.g. [0.25, 0.75]"
            )
        return value

    @field_validator("global_crop_scale", "local_crop_scale")
    @classmethod
    def _is_a_share(cls, value: Range) -> Range:
        if value[1] > 1:
            raise ValueError(
                f"{value} are shares of the image's area: the highest must be at most 1, e.g. [0.25, 1]"
            )
        return value

    @field_validator("blur_sigma")
    @classmethod
    def _is_ordered(cls, value: Range | tuple[Range, Range]) -> Range | tuple[Range, Range]:
        if not all(0 <= low <= high < math.inf for low, high in _ranges(value)):
            raise ValueError(f"{value} must be (lowest, highest) with 0 <= lowest <= highest, e.g. [0.1, 2]")
        return value

    @field_validator("pixel_std")
    @classmethod
    def _can_divide(cls, value: Channels | Auto) -> Channels | Auto:
        if value != "auto" and not all(0 < channel < math.inf for channel in value):
            raise ValueError(f"{value} must be numbers above 0, one per channel, e.g. [0.229, 0.224, 0.225]")
        return value

    @model_validator(mode="after")
    def _agrees_on_the_number_of_crops(self) -> "CropsConfig":
        for group in ("global", "local"):
            number = getattr(self, f"num_{group}_crops")
            for name in (f"{group}_blur_prob", f"{group}_solarize_prob"):
                values = getattr(self, name)
                if isinstance(values, tuple) and len(values) != number:
                    raise ValueError(
                        f"{name}={values} has {len(values)} values for num_{group}_crops={number}; "
                        f"give one per {group} crop, e.g. crops.{name}={list((values * number)[:number])}"
                    )
        if self.num_global_crops + self.num_local_crops < 2:
            raise ValueError(
                "num_global_crops=1 with num_local_crops=0 leaves no two crops to compare; "
                "set crops.num_local_crops=1 or more"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_channels(self) -> "CropsConfig":
        asked = {name: getattr(self, name) for name in OF_COLOURS}
        of_colours = {name: value for name, value in asked.items() if value not in (0, (0, 0))}
        if of_colours and self.channels != 3:
            shown = " and ".join(f"{name}={value}" for name, value in of_colours.items())
            raise ValueError(
                f"{shown} must be 0 with data.channels={self.channels}, since only RGB has that; set "
                f"{' '.join(f'crops.{name}=0' for name in of_colours)}"
            )
        if self.hed_jitter and self.photometric == "device":
            raise ValueError(
                f"hed_jitter={self.hed_jitter:g} runs on CPUs alone, not with photometric=device; set "
                "crops.photometric=cpu"
            )
        for name, default in (("pixel_mean", IMAGENET_MEAN), ("pixel_std", IMAGENET_STD)):
            value = getattr(self, name)
            if value not in ("auto", default) and len(value) != self.channels:
                raise ValueError(
                    f"{name}={list(value)} has {len(value)} values for data.channels={self.channels}; give one per "
                    f"channel, or set crops.{name}=auto"
                )
        return self

    @property
    def crop_sizes(self) -> tuple[int, ...]:
        """Sides of the crops in use, in pixels: global first, then local if there are any."""
        return (self.global_crop_size, self.local_crop_size)[: 2 if self.num_local_crops else 1]


class CropKind(NamedTuple):
    """Settings in effect for one crop of an image, read by sampling and shown in the printed table."""

    name: str
    size: int
    scale: Range
    aspect_ratio: Range
    flip_prob: float
    jitter_prob: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray_prob: float
    blur_prob: float
    blur_sigma: Range
    solarize_prob: float
    solarize_threshold: int


def crop_kinds(config: CropsConfig) -> list[CropKind]:
    """Return one entry per crop of an image: the global crops, then the local crops."""
    c = config
    return [
        _kind(c, 0, f"global {i + 1}", c.global_crop_size, c.global_crop_scale, blur_prob, solarize_prob)
        for i, (blur_prob, solarize_prob) in enumerate(
            zip(c.global_blur_prob, c.global_solarize_prob, strict=True)
        )
    ] + [
        _kind(
            c, 1, f"local {i + 1}", c.local_crop_size, c.local_crop_scale,
            _of(c.local_blur_prob, i), _of(c.local_solarize_prob, i),
        )
        for i in range(c.num_local_crops)
    ]  # fmt: skip


def _kind(
    c: CropsConfig, group: int, name: str, size: int, scale: Range, blur_prob: float, solarize_prob: float
) -> CropKind:
    return CropKind(
        name=name,
        size=size,
        scale=scale,
        aspect_ratio=_ranges(c.aspect_ratio)[group],
        flip_prob=_of(c.flip_prob, group),
        jitter_prob=_of(c.jitter_prob, group),
        brightness=_of(c.brightness, group),
        contrast=_of(c.contrast, group),
        saturation=_of(c.saturation, group),
        hue=_of(c.hue, group),
        gray_prob=_of(c.gray_prob, group),
        blur_prob=1 - blur_prob if c.blur_polarity == "dinov2" else blur_prob,
        blur_sigma=_ranges(c.blur_sigma)[group],
        solarize_prob=solarize_prob,
        solarize_threshold=_of(c.solarize_threshold, group),
    )


def crop_shapes(config: CropsConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of one image's crops: global [G,S,S,C] and local [L,S,S,C]."""
    c = config
    return (
        (c.num_global_crops, c.global_crop_size, c.global_crop_size, c.channels),
        (c.num_local_crops, c.local_crop_size, c.local_crop_size, c.channels),
    )


NUM_PHOTOMETRIC = 11
"""Numbers per crop, float32, that travel with it if `photometric` is device; params.py says which."""


def crop_bytes(config: CropsConfig) -> int:
    """Return the bytes of one image in a block: its crops, and their photometric parameters where these travel."""
    parameters = 4 * NUM_PHOTOMETRIC if config.photometric == "device" else 0
    return sum(config.channels * kind.size**2 + parameters for kind in crop_kinds(config))


def _of(value: Value | tuple[Value, ...], index: int) -> Value:
    """Return the entry at `index`, or the single value that applies to all."""
    return value[index] if isinstance(value, tuple) else value


def _ranges(value: Range | tuple[Range, Range]) -> tuple[Range, Range]:
    """Return the ranges of the global and the local crops, from one range for both or from a pair."""
    first, second = value
    if isinstance(first, tuple) and isinstance(second, tuple):
        return first, second
    return (first, second), (first, second)  # type: ignore[return-value]
