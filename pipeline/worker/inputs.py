"""The images of a run: those that it learns from, and those that it is evaluated on."""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.manifests.manifest import load_or_build
from dinoray.pipeline.data.measured import NOTHING, Measured
from dinoray.pipeline.data.reading.measuring import load_or_measure
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.class_names import Mismatch, class_mismatch
from dinoray.pipeline.evaluation.labels import held_out, labelled_sources
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.auto import measures_pixels
from dinoray.pipeline.worker.config import Config

_NUM_PICTURES = 4
"""Images whose attention is drawn at each evaluation."""


@dataclass(frozen=True)
class Inputs:
    """The images of a run: those that it learns from, and those that it is evaluated on, if any."""

    images: Source
    labelled: tuple[Source, Source] | None
    mismatch: Mismatch | None = None
    """Validation classes without training images; `labelled` is None where no class is shared."""
    measured: Measured = NOTHING
    """What is known of the samples in the files."""

    @classmethod
    def open(cls, config: Config, directory: Directory) -> "Inputs":
        """List them, or read the manifests that `directory` keeps of an earlier listing."""
        manifest = load_or_build(config.data, directory, storage=config.storage)
        images = Source(config.data, manifest, config.storage)
        check_mix(config, images)
        measured = load_or_measure(images, directory, normalises=measures_pixels(config.crops))
        settled = config.data.model_copy(update=measured.settle(config.data))
        config = config.model_copy(update={"data": settled})
        images = Source(settled, manifest, config.storage)
        labelled = evaluated_images(config, images, directory)
        mismatch = class_mismatch(*labelled, config.eval) if labelled else None
        return cls(images, None if mismatch and mismatch.is_disjoint else labelled, mismatch, measured)

    def pictures(self) -> list[tuple[str, NDArray[np.uint8]]]:
        """A handful, the same for each evaluation: evenly spaced ones of those that are classified, if any are."""
        shown = self.labelled[1] if self.labelled else self.images
        spaced = np.linspace(0, shown.num_images - 1, min(_NUM_PICTURES, shown.num_images)).astype(int)
        pictures = []
        for fetched in shown.fetch(spaced.tolist()):
            with contextlib.suppress(BadImage):
                if fetched.data is not None:
                    image = decode(fetched.data, max_pixels=shown.config.max_pixels, config=shown.config)
                    pictures.append((fetched.key, image))
        return pictures


def check_mix(config: Config, images: Source) -> None:
    """ConfigError where a batch would hold an image of a source of `data.mix` more than once, or streams cannot be kept
    together."""
    if not images.parts:
        return
    if config.data.streams > 1 and images.manifest.group_sizes is not None:
        raise ConfigError(
            f"data.streams={config.data.streams} with Parquet or tar files in data.mix, whose windows streams would "
            "read apart from each other; set data.streams=1"
        )
    batch, weights = config.train.global_batch_size, images.manifest.weights
    for part, weight in zip(images.parts, weights, strict=True):
        drawn, number = batch * weight / sum(weights), part.num_images
        if drawn > number:
            most = (sum(weights) - weight) * number / (batch - number)
            raise ConfigError(
                f"train.global_batch_size={batch} draws {drawn:.0f} images a step from the {number} of "
                f"{part.manifest.path}, so a batch would hold an image more than once; lower its weight in data.mix "
                f"from {weight:g} to {_rounded_down(most)}, or train.global_batch_size, or add images"
            )


def _rounded_down(number: float) -> str:
    """To two digits."""
    digits = 1 - math.floor(math.log10(number))
    return f"{math.floor(number * 10**digits) / 10**digits:g}"


def evaluated_images(
    config: Config, images: Source | None, directory: Directory | None = None
) -> tuple[Source, Source] | None:
    """Labelled images that vote and labelled images that are classified: those that the settings name, else a held-out
    part of `images`; None where there are no labels."""
    named = labelled_sources(config.data, config.eval, directory, storage=config.storage)
    if images is None or config.eval.val_path != AUTO:
        return named
    limits = {"max_train_images": config.eval.max_train_images, "max_val_images": config.eval.max_val_images}
    return held_out(images, **limits)
