"""Reads from a store that answers a few requests slowly, with and without `storage.hedge_after_seconds`.

    python benchmarks/hedging.py [--images 2000] [--share 0.01] [--slow 2] [--latency 0.02] [--hedge 0.2 0.5]
                                 [--rounds 3]

The store is a real one (SeaweedFS) on this machine, behind the proxy of the tests, which holds each answer back for
`--latency` seconds, and a `--share` of them, at random, for `--slow` seconds more. The settings take turns. Each reads
all images once in a process of its own, in blocks of 64 as an augment actor does, and decodes none. CPU time is that of
this process. Prints a table for RESULTS.md: medians of the rounds.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from faults import fault_proxy
from servers import aws_environment, s3_server

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage.config import StorageConfig

_BUCKET = "images"
_BLOCK, _BYTES = 64, 110_000
_DATA = f"^GET /{_BUCKET}/objects/"


def read_all(path: str, hedge: float | None, environment: dict[str, str]) -> dict[str, float]:
    """Read all images of `path` in this process."""
    os.environ.update(environment)
    config = DataConfig(path=path)
    source = Source(config, build_manifest(config), StorageConfig(hedge_after_seconds=hedge))
    source.fetch(range(_BLOCK))  # connections
    blocks, begin, cpu = [], time.perf_counter(), time.process_time()
    for first in range(0, source.num_images, _BLOCK):
        before = time.perf_counter()
        images = source.fetch(range(first, min(first + _BLOCK, source.num_images)))
        assert all(image.data is not None for image in images)
        blocks.append(time.perf_counter() - before)
    return {
        "images_per_second": source.num_images / (time.perf_counter() - begin),
        "block_p50": float(np.median(blocks)),
        "block_p99": float(np.quantile(blocks, 0.99)),
        "cpu_ms": 1000 * (time.process_time() - cpu) / source.num_images,
    }


def main(argv: Sequence[str]) -> None:
    """Print a line for each setting."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.01, help="share of slow answers")
    parser.add_argument("--slow", type=float, default=2.0, help="seconds")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds")
    parser.add_argument("--hedge", type=float, nargs="+", default=[0.2, 0.5], help="seconds")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    settings = [None, *options.hedge]
    found: dict[float | None, list[dict[str, Any]]] = {hedge: [] for hedge in settings}
    with s3_server() as server:
        client = server.client()
        client.create_bucket(Bucket=_BUCKET)
        for number in range(options.images):
            body = np.random.default_rng(number).bytes(_BYTES)
            client.put_object(Bucket=_BUCKET, Key=f"objects/{number:06d}.jpg", Body=body)
        with fault_proxy(server.endpoint) as proxy:
            proxy.delay_seconds, proxy.slow_seconds = options.latency, options.slow
            proxy.fail("slow", pattern=_DATA, times=sys.maxsize, share=options.share)
            for _ in range(options.rounds):
                for hedge in settings:
                    before = proxy.count(_DATA)
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        arguments = (f"s3://{_BUCKET}/objects", hedge, aws_environment(proxy.endpoint))
                        row = pool.apply(read_all, arguments)
                    row["gets"] = (proxy.count(_DATA) - before - _BLOCK) / options.images
                    found[hedge].append(row)
                    print(f"{hedge}: {row}", file=sys.stderr, flush=True)
    print(
        "| hedge_after_seconds | images/s | block of 64: median, s | 99 %, s | GETs per image | CPU ms per image |"
    )
    print("|---|---|---|---|---|---|")
    for hedge, rows in found.items():
        names = ("images_per_second", "block_p50", "block_p99", "gets", "cpu_ms")
        values = [float(np.median([row[name] for row in rows])) for name in names]
        shown = "off" if hedge is None else f"{hedge:g}"
        print(
            f"| {shown} | {values[0]:.0f} | {values[1]:.2f} | {values[2]:.2f} | {values[3]:.3f} | {values[4]:.2f} |"
        )


if __name__ == "__main__":
    run_main(main)
