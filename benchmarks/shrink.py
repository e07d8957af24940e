"""What `jobs.pack --shrink` costs once and what it changes: time, bytes, and how far crops move from the photo's own.

    python benchmarks/shrink.py [--images DIR] [--count N] [--set '3 MP' '6 MP']

Crops are cut from the whole photo and from the shrunk one, the same regions with the same colours, and compared in
levels of 255; beside it stands what decoding the photo at a fraction of its size, as the stream does, moves them. What
shrinking gains in speed is a row of benchmarks/augment.py.
"""

import argparse
import statistics
import time
from pathlib import Path

import augment_images
import numpy as np

from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import Crops, apply, cut, limit_threads
from dinoray.pipeline.augment.params import LEFT, WIDTH, CropParams, sample_image
from dinoray.pipeline.data.decoding.jpeg import Decoded, open_image
from dinoray.pipeline.export.packing import shrink, shrink_pixels


def distance(a: Crops, b: Crops) -> list[float]:
    """Return the mean absolute difference of each crop."""
    pairs = zip([*a.global_crops, *a.local_crops], [*b.global_crops, *b.local_crops], strict=True)
    return [float(np.abs(x.astype(int) - y.astype(int)).mean()) for x, y in pairs]


def pixels_of(data: bytes) -> np.ndarray:
    """Return the pixels of the whole picture."""
    return open_image(data).decode(1, lambda size: np.empty(size, np.uint8)).pixels


def moved(params: CropParams, pixels: np.ndarray) -> CropParams:
    """Return the same regions of a smaller picture."""
    height, width = pixels.shape[:2]
    table = params.table.copy()
    table[:, : WIDTH + 1 : 2] *= height / params.height  # top and height
    table[:, LEFT : WIDTH + 1 : 2] *= width / params.width
    return params._replace(width=width, height=height, table=table)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--set", nargs="+", default=["3 MP", "6 MP"], choices=list(augment_images.KINDS))
    arguments = parser.parse_args(argv)
    limit_threads()
    config = CropsConfig()
    most = shrink_pixels(config)
    print(f"shrunk to {most / 1e6:.2f} megapixels where larger\n")
    print(
        "| images | CPU ms to shrink | bytes before | after | crops moved, mean (95 %) | by decoding at a fraction |"
    )
    print("|---|---|---|---|---|---|")
    sets = {
        name: augment_images.draw_photos(augment_images.KINDS[name], arguments.count)
        for name in arguments.set
    }
    if arguments.images:
        sets = {arguments.images: augment_images.read_photos(Path(arguments.images), arguments.count)[0]}
    for name, files in sets.items():
        milliseconds, after, shrunk_by, fraction_by = [], [], [], []
        for i, data in enumerate(files):
            begin = time.process_time()
            small = shrink(data, max_pixels=most)
            milliseconds.append(1000 * (time.process_time() - begin))
            after.append(len(small))
            whole, reduced = pixels_of(data), pixels_of(small)
            params = sample_image(0, 0, str(i), whole.shape[1], whole.shape[0], config)
            wanted = cut(Decoded(whole, 1, 0.0, 0.0), params)
            shrunk_by += distance(cut(Decoded(reduced, 1, 0.0, 0.0), moved(params, reduced)), wanted)
            fraction_by += distance(apply(data, params), wanted)
        cells = [f"{np.mean(d):.2f} ({np.percentile(d, 95):.2f})" for d in (shrunk_by, fraction_by)]
        before = statistics.mean(map(len, files))
        print(
            f"| {name} | {statistics.median(milliseconds):.0f} | {before:,.0f} | {statistics.mean(after):,.0f} "
            f"| {cells[0]} | {cells[1]} |"
        )


if __name__ == "__main__":
    run_main(main)
