"""Measure the samples of a data set, once: which values become black and white, and their mean and spread.

Between the manifest and the run: the driver measures a sample of the images and keeps the result in the run
directory, so a resumed run, evaluations and exports use the same values. Images of 8 bits need no measuring, and
none of them is decoded. No Ray here.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import is_deep, read_samples
from dinoray.pipeline.data.decoding.samples import Samples, to_pixels
from dinoray.pipeline.data.measured import NOTHING, Measured, Range
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject

_NUM_IMAGES, _NUM_LOOKED_AT = 128, 16
"""Images that are measured, and those whose headers decide whether there is anything to measure."""
_AT_ONCE = 16
_PIXELS_EACH = 1 << 14
_PERCENTILES = (0.1, 99.9)
"""Of the samples, so that a few dead or hot pixels do not decide the range."""
_NUM_GROUPS = 8
"""Row groups of Parquet that the images are taken from: each is read whole."""
_OF_8_BITS = (".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp")


def load_or_measure(images: Source, directory: Directory, *, normalises: bool) -> Measured:
    """Return what the run directory keeps of an earlier measurement; else measure, and keep it there.

    `normalises`: mean and spread are asked for, whatever the images are. Before the run has begun, a measurement with
    other settings is replaced.
    """
    config = images.config
    asked = {"asked": [images.manifest.path, config.value_range, config.channels, config.page, normalises]}
    if directory.exists(run_dir.CONFIG):
        return kept_measurement(directory)
    with contextlib.suppress(MissingObject):
        if json.loads(directory.read(run_dir.PIXELS))["asked"] == json.loads(json.dumps(asked))["asked"]:
            return kept_measurement(directory)
    measured = measure(images, normalises=normalises)
    directory.write(run_dir.PIXELS, json.dumps(measured._asdict() | asked).encode())
    return measured


def kept_measurement(directory: Directory) -> Measured:
    """Return what a run directory keeps of a measurement; NOTHING where there is none."""
    try:
        kept = json.loads(directory.read(run_dir.PIXELS))
    except MissingObject:
        return NOTHING
    value_range, mean, std = (kept[name] and tuple(kept[name]) for name in ("value_range", "mean", "std"))
    return Measured(value_range, mean, std, kept["line"])


def measure(images: Source, *, normalises: bool = False) -> Measured:
    """Measure images spread over the data set, if some have more than 8 bits or mean and spread are asked for."""
    config = images.config
    normalises = normalises or config.channels != 3
    if not normalises and (config.value_range is None or not _has_deep(images)):
        return NOTHING
    samples = [_thinned(one) for one in _read(images, _spread(images, _NUM_IMAGES))]
    deep = [one for one in samples if one.is_deep]
    value_range = config.value_range if isinstance(config.value_range, tuple) else None
    if deep and config.value_range == "auto":
        value_range = _range_of(deep, only_colours=config.channels == 3)
    if not deep and not normalises:
        return Measured(value_range)
    mean, std = _mean_and_std(samples, config.model_copy(update={"value_range": value_range}))
    types = " and ".join(sorted({str(one.values.dtype) for one in samples}))
    scale = "" if value_range is None else "data.value_range=[{:g}, {:g}], ".format(*value_range)
    shown = ", ".join(f"{what} {'/'.join(f'{v:.3f}' for v in values or ())}" for what, values in
                      (("mean", mean), ("std", std)))  # fmt: skip
    return Measured(
        value_range, mean, std, f"pixels: {scale}{shown}; measured on {len(samples)} images of {types}"
    )


def _has_deep(images: Source) -> bool:
    looked_at = _spread(images, _NUM_LOOKED_AT, only_unsure=True)
    files = images.fetch(looked_at) if looked_at else []
    return any(is_deep(one.data) for one in files if one.data is not None)


def _spread(images: Source, number: int, *, only_unsure: bool = False) -> list[int]:
    """Return indices of images spread over the data set; `only_unsure`: of those whose names do not tell 8 bits.

    Of Parquet they are of a few row groups; to look at, of those that the run reads first.
    """
    if images.parts:
        each = math.ceil(number / len(images.parts))
        found = [_spread(part, each, only_unsure=only_unsure) for part in images.parts]
        return [first + one for first, some in zip(images.firsts, found, strict=True) for one in some]
    sizes = images.manifest.group_sizes
    if sizes is not None:
        if only_unsure:
            return np.sort(images.order(0).locate(range(min(number, images.num_images)))[1]).tolist()
        groups = np.unique(np.linspace(0, len(sizes) - 1, _NUM_GROUPS).astype(int))
        starts = np.cumsum(sizes) - sizes
        each = math.ceil(number / len(groups))
        return [int(starts[g] + row) for g in groups for row in _evenly(int(sizes[g]), each)]
    if not only_unsure:
        return _evenly(images.num_images, number)
    keys = images.manifest.table["key"]
    unsure = [i for i, key in enumerate(keys.to_pylist()) if not key.lower().endswith(_OF_8_BITS)]
    return [unsure[i] for i in _evenly(len(unsure), number)]


def _evenly(size: int, number: int) -> list[int]:
    return np.unique(np.linspace(0, size - 1, min(size, number)).astype(int)).tolist() if size else []


def _read(images: Source, indices: Sequence[int]) -> Iterator[Samples]:
    for start in range(0, len(indices), _AT_ONCE):
        for fetched in images.fetch(indices[start : start + _AT_ONCE]):
            with contextlib.suppress(BadImage):  # named when the run comes to it
                if fetched.data is not None:
                    config = images.config
                    yield read_samples(fetched.data, max_pixels=config.max_pixels, config=config)


def _thinned(samples: Samples) -> Samples:
    """Return every n-th pixel of every n-th row."""
    height, width = samples.values.shape[:2]
    step = max(1, math.isqrt(height * width // _PIXELS_EACH))
    return samples._replace(values=np.ascontiguousarray(samples.values[::step, ::step]))


def _range_of(deep: Sequence[Samples], *, only_colours: bool) -> Range:
    """Return the range of all channels together, or of those that are colours."""
    values = np.concatenate(
        [one.values[..., : one.num_colours if only_colours else None].ravel() for one in deep]
    )
    values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = np.percentile(values, _PERCENTILES) if len(values) else (0.0, 1.0)
    if all(one.values.dtype.kind != "f" for one in deep):
        low, high = math.floor(low), math.ceil(high)
    return float(low), float(high if high > low else low + 1)


def _mean_and_std(
    samples: Sequence[Samples], config: PixelsConfig
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation of each channel, as shares of 255."""
    pixels: list[NDArray[np.uint8]] = []
    for one in samples:
        with contextlib.suppress(BadImage):
            mapped = to_pixels(one, config)
            pixels.append(mapped.reshape(-1, mapped.shape[-1]))
    if not pixels:
        return None, None
    shares = np.concatenate(pixels) / np.float32(255)
    std = np.maximum(shares.std(axis=0, dtype=np.float64), 1 / 255)  # a channel may be constant
    return _rounded(shares.mean(axis=0, dtype=np.float64)), _rounded(std)


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
