"""From an object store to decoded pixels: ours, Ray Data, PyTorch's DataLoader and others, near and far from the store.

    python benchmarks/storage.py [--images 1500] [--latency 0 0.1] [--rounds 3] [--seconds 4] [--workers 2]
                                 [--only REGEX] [--kind "0.2 MP"] [--json FILE]

The store is a real one (SeaweedFS) on this machine, behind the proxy of the tests, which counts requests and bytes
and holds each answer to a GET back for `--latency` seconds. The same images lie there in several layouts: one object
each (objects), named by their addresses in Parquet (addresses), packed by `jobs.pack` (packed), Parquet of other people
in row groups of 100 (others), tar files as WebDataset's (tars), and the formats of other libraries, where these are
installed: pip install webdataset litdata mosaicml-streaming. They also lie in a folder on the disk. `--only ours`
compares the sources that we read.

The candidates (benchmarks/storage_candidates.py) take turns. Each is a process of its own with `--workers` processes
that fetch and decode. What is measured begins once some images have arrived and ends seconds later, while the stream
goes on. Ray Data's images arrive in few lumps, so all of these are measured, from the start of the plan, in a Ray that
runs. CPU time is user and system time of that process and all below it. The store and the proxy need cores of the same
machine, so rates by the clock are lower than with a store elsewhere; "proxy" is how much of a core the proxy used.

Needs the extras `bench` and `test`. Prints a table for RESULTS.md.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import augment_images
from faults import FaultProxy, fault_proxy
from servers import S3Server, aws_environment, s3_server
from storage_candidates import CANDIDATES, IN_LUMPS, Spec
from storage_sets import ADDRESSES, PUTS, Images, missing_module, write_folder
from storage_tables import Results, Row, kept, table

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import ConfigError

BUCKET = "images"
_PATIENCE_SECONDS = 300.0
"""Longest wait for a candidate's next message."""
_DATA = re.compile(r"^GET [^?]*(\?(?!.*(list-type|location|delimiter=|prefix=))|$)")
"""A request for data, and not for a listing."""


def tree_cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process and of all below it, with those that have ended."""
    root, seconds = psutil.Process(process), 0.0
    for one in [root, *root.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.Error:
            continue  # it has ended just now: its parent has its time
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def watch(steps: Iterator[int], *, warm: int, most: int, seconds: float, note: Callable[[str], None]) -> Row:
    """Return images, seconds and CPU seconds from the step with the `warm`-th image to one `seconds` later.

    It ends at `most` images, before a stream of one epoch runs dry. `note` is called at both ends.
    """
    arrived, first, begin, cpu = 0, 0, 0.0, 0.0
    for count in steps:
        arrived, now = arrived + count, time.perf_counter()
        if not begin and arrived >= warm:
            note("begin")
            first, begin, cpu = arrived, time.perf_counter(), tree_cpu_seconds(os.getpid())
        elif not begin:
            continue
        elif now - begin >= seconds or arrived >= most:
            note("end")
            return {
                "images": arrived - first,
                "seconds": now - begin,
                "cpu_seconds": tree_cpu_seconds(os.getpid()) - cpu,
            }
    raise RuntimeError(f"the stream ended after {arrived} images, before there was anything to measure")


def run_candidate(
    name: tuple[str, str], spec: Spec, limits: dict[str, Any], environment: dict[str, str], pipe: Connection
) -> None:
    """Run one candidate in this process: messages `begin` and `end`, each of which is answered, then the result."""

    def note(message: str) -> None:
        pipe.send(message)
        pipe.recv()

    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a program that was not started by `spawn`
    candidate = CANDIDATES[name]
    steps = candidate(spec)
    if candidate in IN_LUMPS:
        limits = {"warm": 0, "most": spec.images, "seconds": math.inf}
    try:
        pipe.send(watch(steps, **limits, note=note))
    except Exception as error:
        pipe.send(f"failed: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")
    finally:
        steps.close()  # type: ignore[attr-defined]


def measure(
    name: tuple[str, str], spec: Spec, limits: dict[str, Any], proxy: FaultProxy, image_bytes: float
) -> Row | str:
    """Run a candidate in a process of its own; return its figures, or why there are none."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=run_candidate, args=(name, spec, limits, aws_environment(proxy.endpoint), there)
    )
    process.start()
    there.close()
    counts: list[tuple[int, int, float]] = []
    try:
        while True:
            if not here.poll(_PATIENCE_SECONDS):
                return f"nothing for {_PATIENCE_SECONDS:g} s"
            try:
                message = here.recv()
            except EOFError:
                return "its process ended"
            if message not in ("begin", "end"):
                break
            counts.append((proxy.count(_DATA.pattern), proxy.bytes_answered, time.process_time()))
            here.send(None)
    finally:
        _end(process)
    if isinstance(message, str):
        return message
    gets, num_bytes, proxy_seconds = (end - begin for begin, end in zip(*counts, strict=True))
    images, seconds = message["images"], message["seconds"]
    return {
        "images_per_second": images / seconds,
        "cpu_ms": 1000 * message["cpu_seconds"] / images,
        "bytes_read_per_used": num_bytes / images / image_bytes,
        "gets_per_image": gets / images,
        "proxy_cores": proxy_seconds / seconds,
    }


def _end(process: Any) -> None:
    """End a candidate and all that it started."""
    process.join(30)
    family = psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.kill()
    process.join()


def put_sets(images: Images, server: S3Server, chosen: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Write the sets that the chosen candidates read; return why some of these cannot run."""
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    os.environ |= server.env
    missing = {name: module for name in chosen if (module := missing_module(name)) is not None}
    wanted = {layout for layout, name in chosen if (layout, name) not in missing}
    for layout, put in PUTS.items():
        if layout in wanted or (layout == "objects" and wanted & {"packed", ADDRESSES}):
            put(images, client, BUCKET)
    return {name: f"{module} is not installed" for name, module in missing.items()}


def signed_tars(endpoint: str) -> tuple[str, ...]:
    """Return the addresses of the tar files, with signatures for an hour: curl has no keys."""
    client = S3Server(endpoint, Path(os.devnull)).client()
    found = client.list_objects_v2(Bucket=BUCKET, Prefix="tars/").get("Contents", [])
    return tuple(
        client.generate_presigned_url(
            "get_object", Params={"Bucket": BUCKET, "Key": item["Key"]}, ExpiresIn=3600
        )
        for item in found
    )


def main(argv: list[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--unique", type=int, default=100, help="how many files are drawn for them")
    parser.add_argument("--kind", choices=list(augment_images.KINDS), default="0.2 MP", help="what is drawn")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.1], help="seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each is measured")
    parser.add_argument("--warm", type=int, default=256, help="images before it is measured")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--block", type=int, default=64, help="images of a block of ours")
    parser.add_argument(
        "--cache-bytes",
        type=int,
        default=32 << 20,
        help="data.row_group_cache_bytes of ours: as with a real set, a small part of all images",
    )
    parser.add_argument("--only", default="", help="regular expression of `set, candidate`")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args(argv)
    chosen = [name for name in CANDIDATES if re.search(arguments.only, ", ".join(name))]
    if min(arguments.images, arguments.unique, arguments.rounds, arguments.workers, arguments.batch) < 1:
        raise ConfigError("--images, --unique, --rounds, --workers and --batch must be at least 1")
    if not chosen:
        names = "; ".join(map(", ".join, CANDIDATES))
        raise ConfigError(f"--only={arguments.only!r} matches no candidate; there are: {names}")
    most = int(0.9 * arguments.images)
    if arguments.warm >= most:
        raise ConfigError(
            f"--warm={arguments.warm}: must be less than nine tenths of --images={arguments.images}; "
            f"take --images={2 * arguments.warm + 2}"
        )
    limits = {"warm": arguments.warm, "most": most, "seconds": arguments.seconds}
    files = augment_images.draw_photos(augment_images.KINDS[arguments.kind], arguments.unique)
    images = Images(files, arguments.images)
    results: Results = {name: {latency: [] for latency in arguments.latency} for name in chosen}
    with s3_server() as server, tempfile.TemporaryDirectory() as folder:
        write_folder(images, Path(folder))
        failed = put_sets(images, server, chosen)
        with fault_proxy(server.endpoint) as proxy:
            tars = signed_tars(proxy.endpoint)
            for _ in range(arguments.rounds):
                for latency in arguments.latency:
                    proxy.delay_seconds = latency
                    for layout, name in chosen:
                        proxy.requests.clear()
                        spec = Spec(
                            bucket=BUCKET,
                            prefix=layout,
                            images=arguments.images,
                            workers=arguments.workers,
                            batch=arguments.batch,
                            block=arguments.block,
                            cache_bytes=arguments.cache_bytes,
                            folder=folder,
                            tars=tars,
                        )
                        found = failed.get((layout, name)) or measure(
                            (layout, name), spec, limits, proxy, images.mean_bytes
                        )
                        results[layout, name][latency].append(found)
                        print(
                            f"{layout}, {name}, {1000 * latency:g} ms: {found}", file=sys.stderr, flush=True
                        )
    print(
        f"{arguments.images} images, {images.mean_bytes / 1000:.0f} kB on average, {arguments.workers} workers, "
        f"medians of {arguments.rounds} rounds\n"
    )
    print(table(results))
    print("\n" + "\n".join(kept(results)))
    if arguments.json:
        lines = [
            {"set": layout, "candidate": name, "latency": latency, "rounds": rounds}
            for (layout, name), by_latency in results.items()
            for latency, rounds in by_latency.items()
        ]
        arguments.json.write_text(json.dumps({"image_bytes": images.mean_bytes, "lines": lines}, indent=1))


if __name__ == "__main__":
    run_main(main)
