"""Show where a pretrained backbone looks: `python -m jobs.attention RUN IMAGE [IMAGE ...] [--animate]`.

Checkpoint -> backbone -> the class token's attention on a few images -> one sheet, a folder of overlays, and a
film over all checkpoints of the run. Runs in one process, without Ray.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from jobs.arguments import CommandLine
from jobs.config import load_run_config
from jobs.entry import run_main
from jobs.network import open_network
from models.attention import patch_size
from models.settings import ConfigError, DataError
from pipeline.attention_figure import MASS, Looked, animation, figure, look, overlays, png_bytes
from pipeline.checkpoint import Frozen, committed_checkpoints
from pipeline.decode import BadImage, decode
from pipeline.features import subset
from pipeline.loading import load_batches
from pipeline.manifest import DataConfig, build_manifest
from pipeline.source import Source
from pipeline.storage import Directory, MissingObject, is_s3, normal_uri

Named = tuple[str, npt.NDArray[np.uint8]]


def main(argv: Sequence[str]) -> None:
    """Look at the images with one checkpoint, or with all of them for a film; write the pictures, print their paths."""
    parser = CommandLine(prog="python -m jobs.attention", description="Attention maps of a checkpoint.")
    parser.add_argument("run", help="run directory or checkpoint folder, local or s3://")
    parser.add_argument(
        "images", nargs="+", help="image files, folders, s3:// objects or prefixes, Parquet shards"
    )
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="which network")
    parser.add_argument(
        "--mass", type=float, default=MASS, help=f"share of the attention in a mask (default: {MASS})"
    )
    parser.add_argument(
        "--image-size", type=int, default=None, help="shorter side in pixels (default: about 30 patches)"
    )
    parser.add_argument("--image-column", default=None, help="Parquet: column of images (default: the run's)")
    parser.add_argument("--max-images", type=int, default=8, help="how many images at most (default: 8)")
    parser.add_argument("--animate", action="store_true", help="also a GIF over the run's checkpoints")
    parser.add_argument("--out", default=None, help="folder or s3:// prefix (default: RUN/attention)")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.mass <= 1:
        raise ConfigError(f"--mass={arguments.mass} must be above 0 and at most 1, e.g. {MASS}")
    for name, value, least in (
        ("image-size", arguments.image_size, 8),
        ("max-images", arguments.max_images, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}")

    found, frozen, step = open_network(arguments.run, arguments.step, arguments.which)
    if arguments.animate and found.run is None:
        raise ConfigError(
            f"--animate needs a run with its checkpoints, {found.folder.uri} is a single one; give the run directory"
        )
    patch_size(frozen.backbone())  # a network without such attention is told before any image is read
    column = arguments.image_column or _image_column(found.run)
    images = _read_images(arguments.images, column, arguments.max_images)
    out = Directory(arguments.out) if arguments.out else (found.run or Directory(".")).child("attention")

    def draw(frozen: Frozen, step: int) -> tuple[list[Looked], bytes]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        looked = list(
            look(frozen.backbone(device), images, frozen.config.crops, image_size=arguments.image_size)
        )
        title = f"{frozen.config.backbone.name}, {arguments.which}, step {step}"
        return looked, png_bytes(figure(looked, title=title, mass=arguments.mass))

    looked, sheet = draw(frozen, step)
    name = f"attention_step_{step:08d}"
    out.write(f"{name}.png", sheet)
    print(out.join(f"{name}.png"))
    for number, one in enumerate(looked):
        folder = out.child(name).child(f"{number:03}_{_file_name(one.key)}")
        for picture, image in overlays(one, arguments.mass).items():
            folder.write(f"{picture}.png", png_bytes(image))
        print(folder.uri)
    if arguments.animate and found.run is not None:
        checkpoints = found.run.child("checkpoints")
        frames = [
            sheet
            if checkpoint == found.name
            else draw(*open_network(checkpoints.join(checkpoint), None, arguments.which)[1:])[1]
            for checkpoint in committed_checkpoints(found.run)
        ]
        out.write("attention.gif", animation(frames))
        print(f"{out.join('attention.gif')}  ({len(frames)} checkpoints)")


def _image_column(run: Directory | None) -> str:
    """The column that the run's own images are in; a checkpoint's copy or folder has no config.yaml to say so."""
    if run is None or not run.exists("config.yaml"):
        return DataConfig.model_fields["image_column"].default
    return load_run_config(run).data.image_column


def _read_images(addresses: Sequence[str], column: str, limit: int) -> list[Named]:
    """The first `limit` readable images; what cannot be read is named. DataError when nothing can."""
    images: list[Named] = []
    for address in addresses:
        for key, image, reason in _load(address, column, limit - len(images)):
            if image is None:
                print(f"skipped {key}: {reason}", file=sys.stderr)
            else:
                images.append((key, image))
        if len(images) == limit:
            break
    if not images:
        raise DataError(f"none of the images in {', '.join(addresses)} can be read; see the lines above")
    return images


def _load(address: str, column: str, limit: int) -> Iterator[tuple[str, npt.NDArray[np.uint8] | None, str]]:
    """(key, image or None, reason): the file itself, or a fixed random choice of `limit` from what lies there."""
    config = DataConfig(path=address, image_column=column)
    path = normal_uri(address)
    if is_s3(path) or os.path.isdir(path) or path.lower().endswith(".parquet"):
        source = Source(config, build_manifest(config))
        indices = subset(source.num_images, limit).tolist()
        for batch in load_batches(source, indices, lambda image, _: image, batch_size=16):
            for loaded in batch:
                yield loaded.key, loaded.pixels, loaded.reason
        return
    folder, name = os.path.split(path)
    try:
        yield name, decode(Directory(folder).read(name), max_pixels=config.max_pixels), ""
    except MissingObject:
        yield address, None, "there is no such file or folder"
    except (BadImage, DataError) as error:
        yield address, None, str(error)


def _file_name(key: str) -> str:
    """A part of a path that any system takes, made of an image's key."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(key).name)[-60:].strip("._") or "image"


if __name__ == "__main__":
    run_main(main)
