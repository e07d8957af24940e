"""Images per second that one CPU core turns from JPEG bytes into all crops: published pipeline, peers, ours.

    python benchmarks/augment.py [crops.key=value ...] [--set "0.2 MP" ...] [--images FOLDER] [--count 32]
                                 [--rounds 3] [--only NAME ...] [--threads 2] [--json FILE] [--plot FILE.png]

The recipe is DINO's: 2 crops of 224 and 8 of 96 pixels with the published probabilities, which are the defaults of
`crops`. The process is pinned to one core, every library has one thread, the files lie in memory. All pipelines take
a block of images in turn before the next block, so that each mostly follows itself, as in training. What counts is CPU
time: so the ratios hold on a shared machine. An image's time is its mean over the rounds, each with random numbers of
its own; ratios are medians over the images of the ratio on the same image.

Images are drawn (benchmarks/augment_images.py) unless a folder is given. What is not installed is left out, and said
so; `pip install -e .[bench]` has what can be had. --threads compares ours in a pool of threads to one thread, by the
clock. "Colours on the device" is what `crops.photometric=device` leaves to the CPU. Prints tables for RESULTS.md.
"""

import os

# Set before the imports below, which read these variables only once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would query the network for its newest version

import argparse
import gc
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import augment_images
import augment_peers as peers
import augment_tables as tables
import numpy as np
import torch

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.pipeline.augment import jit
from dinoray.pipeline.augment.augmenter import BufferPool
from dinoray.pipeline.augment.config import CropsConfig, crop_shapes
from dinoray.pipeline.augment.multicrop import Crops, apply, limit_threads, prepare_kernel
from dinoray.pipeline.augment.params import sample_image
from dinoray.pipeline.data.decoding.jpeg import open_image

SHRUNK_PIXELS = 270_000
"""Pixels of a shrunk stored image: a local crop of the smallest share is then 116 px wide."""

BLOCK = 8
"""Images in a row. In turn image by image, ours was slower by a third: the published pipeline empties the caches."""


def ours(config: CropsConfig, **changes: str) -> peers.Cut:
    """Return what an augment actor does with a file; `changes` are settings of `config` that are others.

    Header, parameters, decoding, uint8 crops in memory that was used before.
    """
    config = config.model_copy(update={"kernel": "numba", **changes})
    if config.kernel == "numba" and jit.MISSING:
        raise peers.CannotCut(f"no numba: {jit.MISSING}")
    prepare_kernel(config)
    epochs, memory, shapes = itertools.count(), BufferPool(), crop_shapes(config)
    split, num_bytes = math.prod(shapes[0]), sum(map(math.prod, shapes))

    def cut(data: bytes) -> Any:
        image = open_image(data)
        params = sample_image(0, next(epochs), "image.jpg", image.width, image.height, config)
        if config.photometric == "device":
            params, _ = params.split_photometric()
        groups = np.split(memory.take(num_bytes), [split])
        return apply(image, params, out=Crops(*map(np.reshape, groups, shapes)))

    return cut


def shrink_once(config: CropsConfig) -> Callable[[bytes], bytes]:
    """Return the function of `jobs.pack --shrink`: its result is stored and read instead of the file."""
    from dinoray.pipeline.export.packing import shrink

    return lambda data: shrink(data, max_pixels=SHRUNK_PIXELS)


def decode_only(config: CropsConfig) -> peers.Cut:
    """Return a pipeline that only decodes the whole image: the bound for all that decode at full size."""
    import simplejpeg

    return lambda data: simplejpeg.decode_jpeg(data, "RGB")


def entropy_decode_only(config: CropsConfig) -> peers.Cut:
    """Return a pipeline that decodes at an eighth of each side.

    Nearly all of its time is spent reading bits, which every decoder must do.
    """
    import simplejpeg

    def cut(data: bytes) -> Any:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // 8), min_width=-(-width // 8))

    return cut


class Pipeline(NamedTuple):
    """A pipeline as a row of the comparison."""

    make: Callable[[CropsConfig], peers.Cut]
    cuts: bool = True
    """False for a pipeline that only decodes."""
    prepare: Callable[[CropsConfig], Callable[[bytes], bytes]] | None = None
    """Returns the function that is applied to each file once, before the timing."""


PIPELINES = {
    tables.REFERENCE: Pipeline(peers.published),
    "torchvision v2, Pillow": Pipeline(peers.torchvision_pillow),
    "torchvision v2, tensor": Pipeline(peers.torchvision_tensor),
    "albumentations": Pipeline(peers.albumentations),
    "albumentations, no antialias": Pipeline(peers.albumentations_aliased),
    "lightly": Pipeline(peers.lightly),
    "kornia": Pipeline(peers.kornia),
    "DALI": Pipeline(peers.dali),
    tables.OURS: Pipeline(ours),
    "ours, colours on the device": Pipeline(partial(ours, photometric="device")),
    "ours without numba": Pipeline(partial(ours, kernel="torch")),
    "ours after pack --shrink": Pipeline(ours, prepare=shrink_once),
    tables.FLOOR: Pipeline(decode_only, cuts=False),
    "entropy decode only": Pipeline(entropy_decode_only, cuts=False),
}


def make_all(
    names: Sequence[str], config: CropsConfig
) -> tuple[dict[str, peers.Cut], dict[str, Callable[[bytes], bytes]], dict[str, str]]:
    """Return, by name: pipelines, file preparations for some of them, and reasons for omitted pipelines."""
    cuts: dict[str, peers.Cut] = {}
    prepares: dict[str, Callable[[bytes], bytes]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        make, _, prepare = PIPELINES[name]
        try:
            if prepare is not None:
                prepares[name] = prepare(config)
            cuts[name] = make(config)
        except ModuleNotFoundError as error:
            left_out[name] = f"not installed: {error.name}"
        except peers.CannotCut as error:
            left_out[name] = str(error)
    return cuts, prepares, left_out


def warm_up(name: str, cut: peers.Cut, files: Sequence[bytes], config: CropsConfig) -> str:
    """Run a pipeline until its caches and compilers are warm; check its crops and return their dtype."""
    made = [cut(data) for data in [files[0], files[0], *files[1:3]]]
    return peers.look_at(name, made[0], made[1], config) if PIPELINES[name].cuts else ""


def measure(
    cuts: Mapping[str, peers.Cut], files: Mapping[str, Sequence[bytes]], *, rounds: int
) -> dict[str, list[float]]:
    """Return CPU seconds by name, one per image: the mean over the rounds."""
    count = min(map(len, files.values()))
    seconds = {name: [0.0] * count for name in cuts}
    gc.disable()  # keeps one pipeline's garbage out of another's time
    for _ in range(rounds):
        for first, (name, cut) in itertools.product(range(0, count, BLOCK), cuts.items()):
            for i in range(first, min(first + BLOCK, count)):
                begin = time.process_time()
                cut(files[name][i])
                seconds[name][i] += (time.process_time() - begin) / rounds
            gc.collect()
    gc.enable()
    return seconds


def measure_threads(cut: peers.Cut, files: Sequence[bytes], *, threads: int, rounds: int) -> dict[str, Any]:
    """Return images/s by the clock in alternating pools of 1 and `threads` threads, and the median ratio."""

    def images_per_second(pool: ThreadPoolExecutor) -> float:
        many = [*files] * 4
        begin = time.perf_counter()
        for _ in pool.map(cut, many):
            pass
        return len(many) / (time.perf_counter() - begin)

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(threads) as several:
        images_per_second(several)  # each thread has its own caches
        pairs = [(images_per_second(one), images_per_second(several)) for _ in range(rounds)]
    ratios = [several / one for one, several in pairs]
    return {
        "threads": threads,
        "images_per_second": [statistics.median(values) for values in zip(*pairs, strict=True)],
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def pin(cores: Sequence[int]) -> None:
    """Pin this process and its future threads to these cores, if the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def main(argv: Sequence[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", choices=augment_images.KINDS, default=["0.2 MP", "3 MP"])
    parser.add_argument("--images", type=Path, default=None, metavar="FOLDER", help="JPEG files, as one set")
    parser.add_argument("--count", type=int, default=32, help="images of each set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PIPELINES, default=list(PIPELINES), metavar="NAME")
    parser.add_argument(
        "--threads", type=int, default=1, help="also compare ours in a pool of so many threads"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE.png")
    parser.add_argument("overrides", nargs="*", metavar="crops.key=value")
    arguments = parser.parse_args(argv)
    if min(arguments.count, arguments.rounds, arguments.threads) < 1:
        raise ConfigError("--count, --rounds and --threads must be at least 1")
    for option, file in (("--json", arguments.json), ("--plot", arguments.plot)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{option}={file}: there is no folder {file.parent}; make it first")
    # This recipe keeps the defaults of the crops.
    config = load_config("vit_small_imagenet_vanilla", None, ["data.path=-", *arguments.overrides]).crops
    if config.interpolation != "bicubic":
        raise ConfigError(
            f"crops.interpolation={config.interpolation!r} must be bicubic: the others are set up for that"
        )
    cores = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    )
    if arguments.threads > len(cores):
        raise ResourceError(f"--threads={arguments.threads} need a core each, this process has {len(cores)}")
    pin(cores[-1:])
    limit_threads()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    cuts, prepares, left_out = make_all(arguments.only, config)
    if not cuts:
        raise ConfigError(f"--only: {'; '.join(f'{name} is {why}' for name, why in left_out.items())}")
    results: dict[str, list[tables.Row]] = {}
    all_files: dict[str, list[bytes]] = {}
    for title in [str(arguments.images)] if arguments.images else arguments.set:
        files = all_files[title] = read(arguments.images, title, arguments.count)
        by_name = {name: [prepares[name](f) for f in files] if name in prepares else files for name in cuts}
        outputs = {name: warm_up(name, cut, by_name[name], config) for name, cut in cuts.items()}
        seconds = measure(cuts, by_name, rounds=arguments.rounds)
        results[title] = tables.rows_of(seconds, outputs)
        print(tables.table(f"{title}, {len(files)} images", results[title], left_out), end="\n\n", flush=True)
    report = {
        "rows": tables.as_json(next(iter(results.values()))),
        "sets": {title: tables.as_json(rows) for title, rows in results.items()},
        "left_out": left_out,
        "machine": tables.machine(),
    }
    if arguments.threads > 1:
        pin(cores[-arguments.threads :])
        title, files = next(iter(all_files.items()))
        measured = measure_threads(ours(config), files, threads=arguments.threads, rounds=arguments.rounds)
        report["threads"] = measured
        one, several = measured["images_per_second"]
        low, high = measured["ratio_range"]
        print(
            f"ours on {title} by the clock: {several:.0f} images/s in {arguments.threads} threads on as many cores, "
            f"{measured['ratio']:.2f} times one thread's {one:.0f} ({low:.2f} to {high:.2f} by round)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    if arguments.plot:
        tables.plot(results, arguments.plot)


def read(folder: Path | None, title: str, count: int) -> list[bytes]:
    """Return the files of a set, after printing a line that describes them."""
    if folder is None:
        files, others = augment_images.draw_photos(augment_images.KINDS[title], count), 0
    else:
        files, others = augment_images.read_photos(folder, count)
    pixels = sum(augment_images.num_pixels(file) for file in files)
    size = sum(map(len, files))
    skipped = f", {others} other file{'s' * (others > 1)} skipped" if others else ""
    print(
        f"{title}: {len(files)} JPEG files, {pixels / len(files) / 1e6:.2f} megapixels and {size / len(files):,.0f} "
        f"bytes on average, {8 * size / pixels:.1f} bits a pixel{skipped}",
        end="\n\n",
    )
    return files


if __name__ == "__main__":
    run_main(main)
