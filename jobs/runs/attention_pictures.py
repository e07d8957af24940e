"""Pictures of what a checkpoint attends to, of images that are named, and of a run's own as it learns."""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.runs.open_checkpoint import open_network, standalone_config
from dinoray.models.attention import patch_size
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.config import DataConfig, PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.figures.attention_animation import animation, read_frames
from dinoray.pipeline.figures.attention_sheet import compute_attention, figure, overlays
from dinoray.pipeline.figures.config import MASS
from dinoray.pipeline.figures.drawing import png_bytes
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3, normal_uri
from dinoray.pipeline.training.checkpoint import FrozenBackbone, find_checkpoint
from dinoray.pipeline.worker.config import Config

_EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,7}(?=#|$)")
"""Of a file's name, also where the number of a Parquet row follows it."""

Named = tuple[str, npt.NDArray[np.uint8]]


def check(arguments: argparse.Namespace) -> None:
    """ConfigError for values that no run can take."""
    if not 0 < arguments.mass <= 1:
        raise ConfigError(f"--mass={arguments.mass} must be above 0 and at most 1, e.g. {MASS}")
    for name, value, least in (
        ("image-size", arguments.image_size, 8),
        ("max-images", arguments.max_images, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}")
    if not arguments.images and not arguments.animate:
        raise ConfigError(
            "no images are given; name files or folders, or pass --animate for the run's own images"
        )
    if arguments.animate and _run(arguments) is None:
        raise ConfigError(
            f"--animate needs the evaluations of a run, but {arguments.run} is a single checkpoint; "
            "give the run directory"
        )


def draw(arguments: argparse.Namespace) -> None:
    """A sheet of all images, and a folder of overlays for each."""
    found, frozen, step = open_network(arguments.run, arguments.step, arguments.which)
    patch_size(frozen.backbone())  # fails, where the network has no such attention, before any image is read
    config = _as_in_run(found.run, frozen, arguments.overrides)
    column = arguments.image_column or config.data.image_column
    pixels = config.with_pixels_of(frozen.config).algorithm().data
    images = _read_images(arguments.images, column, pixels, arguments.max_images, config.storage)
    out = _out(arguments, found.run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    crops = frozen.config.crops
    looked = list(compute_attention(frozen.backbone(device), images, crops, image_size=arguments.image_size))
    title = f"{frozen.config.backbone.name}, {arguments.which}, step {step}"
    name = f"attention_step_{step:08d}"
    out.write(f"{name}.png", png_bytes(figure(looked, title=title, mass=arguments.mass)))
    print(out.join(f"{name}.png"))
    digits = max(3, len(str(len(looked) - 1)))
    for number, one in enumerate(looked):
        folder = out.child(name).child(f"{number:0{digits}}_{_folder_name(one.key)}")
        for picture, image in overlays(one, arguments.mass).items():
            folder.write(f"{picture}.png", png_bytes(image))
        print(folder.uri)


def animate(arguments: argparse.Namespace) -> None:
    """A GIF of the figures that the run's evaluations have drawn, whatever checkpoints were kept."""
    run = _run(arguments)
    assert run is not None  # see check
    frames, damaged = read_frames(run)
    for name in damaged:
        print(f"skipped {run.join(name)}: it cannot be read as PNG", file=sys.stderr)
    out = _out(arguments, run)
    out.write("attention.gif", animation(frames))
    evaluations = "1 evaluation" if len(frames) == 1 else f"{len(frames)} evaluations"
    steps = f"step {frames[0].step}" if len(frames) == 1 else f"steps {frames[0].step} to {frames[-1].step}"
    print(f"{out.join('attention.gif')}  ({evaluations}, {steps}: the teacher on the run's own images)")


def _run(arguments: argparse.Namespace) -> Directory | None:
    """The run directory that the address stands for, also before its first checkpoint; None for a lone checkpoint."""
    here = Directory(arguments.run)
    return find_checkpoint(arguments.run).run if here.exists(run_dir.META) else here


def _out(arguments: argparse.Namespace, run: Directory | None) -> Directory:
    return Directory(arguments.out) if arguments.out else (run or Directory(".")).child(run_dir.ATTENTION)


def _as_in_run(run: Directory | None, network: FrozenBackbone, overrides: Sequence[str]) -> Config:
    """The settings of the run, with overrides; without config.yaml, which a checkpoint's copy lacks, the defaults."""
    if run is not None and run.exists(run_dir.CONFIG):
        return load_run_config(run, overrides)
    return standalone_config(network, {"data": {"path": "."}}, overrides)


def _read_images(
    addresses: Sequence[str], column: str, pixels: PixelsConfig, limit: int, storage: StorageConfig
) -> list[Named]:
    """The first `limit` readable images; what cannot be read is named. DataError when nothing can."""
    images: list[Named] = []
    for address in addresses:
        for key, image, reason in _load(address, column, pixels, limit - len(images), storage):
            if image is None:
                print(f"skipped {key}: {reason}", file=sys.stderr)
            else:
                images.append((key, image))
        if len(images) == limit:
            break
    if not images:
        raise DataError(f"none of the images in {', '.join(addresses)} can be read; see the lines above")
    return images


def _load(
    address: str, column: str, pixels: PixelsConfig, limit: int, storage: StorageConfig
) -> Iterator[tuple[str, npt.NDArray[np.uint8] | None, str]]:
    """(key, image or None, reason): the file itself, or a fixed random choice of `limit` from what lies there."""
    config = DataConfig(path=address, image_column=column, **dict(pixels))
    path = normal_uri(address)
    if is_s3(path) or os.path.isdir(path) or path.lower().endswith(".parquet"):
        source = Source(config, build_manifest(config, storage, setting="argument images"), storage)
        indices = subset(source.num_images, limit).tolist()
        for batch in load_batches(source, indices, lambda image, _: image, batch_size=16):
            for loaded in batch:
                yield loaded.key, loaded.pixels, loaded.reason
        return
    folder, name = os.path.split(path)
    try:
        yield name, decode(Directory(folder).read(name), max_pixels=config.max_pixels, config=config), ""
    except MissingObject:
        yield address, None, "there is no such file or folder"
    except (BadImage, DataError) as error:
        yield address, None, str(error)


def _folder_name(key: str) -> str:
    """A part of a path that any system takes, made of an image's key without its extension."""
    name = _EXTENSION.sub("", key.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return re.sub(r"[^A-Za-z0-9-]+", "_", name)[-60:].strip("_-") or "image"
