"""The preprocessing that initial weights were published with, beside the run's own. No Ray, no files here.

A start that scores much worse with the run's preprocessing than with the published one shows that the two do not fit.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from dinoray.pipeline.augment.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig
from dinoray.pipeline.tracking.scalar_names import PUBLISHED
from dinoray.pipeline.tracking.scores import in_words, score_in_words
from dinoray.pipeline.tracking.start import LABEL_FREE_NAMES, Line, gain_of, standard_error
from dinoray.pipeline.training.config import DINOConfig

_DINO_SHARE = 224 / 256
_LEAST_POINTS, _LEAST_ERRORS = 0.02, 3.0
"""Two k-NN accuracies of the same weights differ much if they do by this and by so many standard errors."""
_MUCH = 0.25
"""So do two label-free scores, by this share of the larger one."""
_SAME = 1e-3
"""Difference below which two means, standard deviations or shares are the same."""


class Preprocessing(NamedTuple):
    """How images become inputs, at any size: resize, cut the central square, subtract the mean, divide by std."""

    source: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    share: float = _DINO_SHARE
    """Side of the square as a share of the shorter side."""
    interpolation: str = "bicubic"

    def cut(self, size: int) -> "Cut":
        """Return the resizing for squares of `size` pixels, rounded as timm does."""
        resampling = getattr(Image.Resampling, self.interpolation.upper(), Image.Resampling.BICUBIC)
        return Cut(math.floor(size / self.share), resampling)

    def normalise(self, crops: CropsConfig) -> CropsConfig:
        """Return `crops` with this mean and standard deviation."""
        return crops.model_copy(update={"pixel_mean": self.mean, "pixel_std": self.std})

    def normalises_as(self, crops: CropsConfig) -> bool:
        """Return True if mean and standard deviation are those of `crops`."""
        ours, theirs = (*self.mean, *self.std), (*crops.pixel_mean, *crops.pixel_std)
        return len(ours) == len(theirs) and all(
            abs(a - float(b)) < _SAME for a, b in zip(ours, theirs, strict=True)
        )

    def __str__(self) -> str:
        """`mean 0.5 0.5 0.5, std 0.5 0.5 0.5, central 90 %, bicubic`."""
        mean, std = (" ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}, central {self.share:.0%}, {self.interpolation}"


class Cut(NamedTuple):
    """Resizing before the central square is cut: the shorter side in pixels, and Pillow's filter."""

    short: int
    resampling: Image.Resampling


def published_preprocessing(
    config: DINOConfig, *, from_file: bool, timm_weights: str | None = None
) -> Preprocessing | None:
    """Return what the initial weights of a run were published with; None if that is the run's own, or not known.

    For weights that timm publishes (`timm_weights` is their name, None: `backbone.name`), timm's data config. For those
    of a file (`from_file`, not of a run) it is that of `backbone.name` if the name has a tag
    (`vit_small_patch14_dinov2.lvd142m`), and else ImageNet's mean and standard deviation with DINO's crop. Others were
    not published.
    """
    import timm  # takes seconds

    name, found = timm_weights or config.backbone.name, None
    if config.backbone.pretrained or timm_weights or (from_file and "." in name):
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None:
            source = f"timm's data config of {name}"
            share = cfg.crop_pct or _DINO_SHARE
            found = Preprocessing(source, tuple(cfg.mean), tuple(cfg.std), share, cfg.interpolation)
    elif from_file:
        found = Preprocessing("ImageNet's, as DINO and most others use it", IMAGENET_MEAN, IMAGENET_STD)
    if found is None or len(config.crops.pixel_mean) != len(found.mean):
        return None
    is_cut_the_same = abs(found.share - _DINO_SHARE) < _SAME and found.interpolation == "bicubic"
    return None if is_cut_the_same and found.normalises_as(config.crops) else found


def start_warnings(
    start: Line, published: Preprocessing | None, crops: CropsConfig, *, from_weights: bool
) -> Iterator[str]:
    """Yield what the scores of the initial weights show to be wrong with them or with the preprocessing.

    `start`: the scores before the first step, also with the `published` preprocessing, if it is not the run's.
    """
    if from_weights and (guess := _guesses(start)):
        yield (
            f"the initial weights classify no better than the commonest class: {guess}; check that init.from or "
            "backbone.name has the weights you mean, and that class folders are classes"
        )
    theirs = {name.removeprefix(PUBLISHED): v for name, v in start.items() if name.startswith(PUBLISHED)}
    if (
        published is None
        or not theirs
        or not (words := _difference(start, {**theirs, "step": start["step"]}))
    ):
        return
    remedy = "check that the weights are the published ones, and that the images are what they expect"
    if not published.normalises_as(crops):
        mean, std = (f"[{','.join(f'{x:g}' for x in values)}]" for values in (published.mean, published.std))
        remedy = f"set crops.pixel_mean={mean} crops.pixel_std={std}, or {remedy}"
    yield (
        f"the initial weights score {words} with the published preprocessing ({published.source}: {published}); "
        f"{remedy}"
    )


def _difference(ours: Line, theirs: Line) -> str:
    """Return both scores in words if they differ much; else nothing."""
    gain = gain_of(ours, theirs)
    if gain is not None:
        least = max(_LEAST_POINTS, _LEAST_ERRORS * (gain.error or 0.0))
        if abs(gain.difference) <= least:
            return ""
        both = in_words(gain.metric, gain.start), score_in_words(gain.metric, gain.score)
        return f"{both[0]} with this run's preprocessing and {both[1]}"
    for name, label in LABEL_FREE_NAMES.items():
        a, b = ours.get(name), theirs.get(name)
        if a is not None and b is not None and abs(a - b) > _MUCH * max(a, b):
            return f"{label} {a:.3g} with this run's preprocessing and {b:.3g}"
    return ""


def _guesses(start: Line) -> str:
    """Return the start's k-NN beside always guessing the commonest class, if it is not above that beyond noise."""
    gain, majority, num_images = gain_of(start, start), start.get("majority"), start.get("num_val")
    if gain is None or majority is None or not num_images:
        return ""
    if gain.score - majority > standard_error(gain.score, majority, num_images):
        return ""
    return f"{in_words(gain.metric, gain.score)}, majority guess {majority:.1%} of {num_images} images"
