"""Seconds and peak memory of the manifest of a large data set: listed, written, read, and its order begun.

    python benchmarks/manifest.py [--images 1000000 10000000] [--target 100000000] [--row-groups 1000000]

The listing is generated, page by page as S3 gives it, in the order of its keys; it holds a JSON file for every
hundred images. Each size runs in a process of its own. One line extrapolates from the two largest sizes.

The last line is about Parquet: row groups of 100 images, ten in a shard. It tells what an augment actor adds to the
memory of its node: `MB_shared` lie in Ray's store once a node, `MB_heap` in each process; and how long the order takes
for a block of 192 images, once the epoch has begun.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.pipeline.data.listing import contents
from dinoray.pipeline.data.listing.listing import Listing
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.pages import LISTED

_PAGE = 1000
_CHUNK = 100 * _PAGE
_PER_FOLDER = 1300
_GROUPS_OF_SHARD, _ROWS_OF_GROUP = 10, 100
_BLOCK = 192
_PATH = "s3://bucket/data"


def pages(num_images: int) -> Iterator[pa.RecordBatch]:
    """Yield pages of a thousand objects: `data/n00000012/0000015601.jpeg`."""
    rng = np.random.default_rng(0)
    for begin in range(0, num_images, _CHUNK):
        index = np.arange(begin, min(begin + _CHUNK, num_images))
        folder, number = (
            pc.utf8_lpad(pc.cast(pa.array(values), pa.large_string()), width, "0")
            for values, width in ((index // _PER_FOLDER, 8), (index, 10))
        )
        suffix = pa.array(np.where(index % 100 == 0, ".json", ".jpeg"), pa.large_string())
        texts = [pa.scalar(text, pa.large_string()) for text in ("data/n", "/", "")]
        key = pc.binary_join_element_wise(texts[0], folder, texts[1], number, suffix, texts[2])
        digits = np.frombuffer(b"0123456789abcdef", np.uint8)[rng.integers(0, 16, 32 * len(index))]
        offsets = np.arange(len(index) + 1, dtype=np.int32) * 32
        etag = pa.StringArray.from_buffers(len(index), pa.py_buffer(offsets), pa.py_buffer(digits))
        columns = [key, pa.array(index + 1, pa.int64()), etag, pa.nulls(len(index), pa.string())]
        batch = pa.record_batch(columns, LISTED)
        yield from (batch.slice(place, _PAGE) for place in range(0, len(index), _PAGE))


def now() -> tuple[float, float]:
    """Return the time, and the time that cores have worked for this process, in seconds."""
    return time.perf_counter(), time.process_time()


def measure(num_images: int) -> dict[str, Any]:
    """Make, write and read the manifest of a listing of so many objects in this process."""
    contents.list_entries = lambda *_, **__: Listing("s3://bucket", "data/", pages(num_images))
    config, times = DataConfig(path=_PATH), [now()]
    with tempfile.TemporaryDirectory() as folder:
        directory = Directory(folder)
        for _ in pages(num_images):
            pass
        times.append(now())
        manifest = build_manifest(config)
        times.append(now())
        directory.write("manifest.parquet", manifest.to_bytes())
        times.append(now())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        expected, num_bytes = (
            manifest.table.slice(0, 3).to_pylist(),
            Path(folder, "manifest.parquet").stat().st_size,
        )
        del manifest
        manifest = Manifest.from_bytes(directory.read("manifest.parquet"), config)
        times.append(now())
    order = Order(manifest.num_images, seed=0)
    order.locate(np.arange(1024))
    times.append(now())
    assert manifest.table.slice(0, 3).to_pylist() == expected
    generate, build, *others = np.diff(times, axis=0)
    steps = dict(zip(("list", "write", "read", "order"), [build - generate, *others], strict=True))
    return {
        "images": manifest.num_images,
        "seconds": {name: round(step[0], 2) for name, step in steps.items()},
        "total": round(sum(step[0] for step in steps.values()), 2),
        "cpu": round(sum(step[1] for step in steps.values()), 2),
        "GB_to_write": round(peak * 1024 / 1e9, 3),
        "GB_peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "GB_file": round(num_bytes / 1e9, 3),
    }


def measure_row_groups(num_groups: int) -> dict[str, Any]:
    """Pickle and unpickle the source and the order of so many row groups as Ray does, and locate blocks of images."""
    shards = np.arange(num_groups) // _GROUPS_OF_SHARD
    columns = {
        "key": pa.array(
            [f"data/{shard // 1000:06}/{shard:010}.parquet" for shard in shards], pa.large_string()
        ),
        "size": pa.array(shards + 1),
        "etag": pa.array([f"{shard:032x}" for shard in shards]),
        "row_group": pa.array(np.arange(num_groups) % _GROUPS_OF_SHARD, pa.int32()),
    }
    for name, value in (("num_rows", _ROWS_OF_GROUP), ("num_bytes", 10**7), ("num_unlabelled", 0)):
        columns[name] = pa.array(np.full(num_groups, value))
    listed: dict[str, Any] = {"path": _PATH, "image_column": "image", "label_from_parent": False}
    listed |= dict.fromkeys(("key_column", "label_column"))
    config = DataConfig(path=_PATH)
    source = Source(config, Manifest(pa.table(columns), "parquet", "s3://bucket", 0, listed))
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps((source, source.order(0)), protocol=5, buffer_callback=buffers.append)
    process = psutil.Process()
    before = process.memory_info().rss
    kept, order = pickle.loads(data, buffers=[buffer.raw() for buffer in buffers])
    begin = time.perf_counter()
    order.locate(np.arange(_BLOCK))
    first = time.perf_counter() - begin
    heap, seconds = process.memory_info().rss - before, []
    for position in np.random.default_rng(0).integers(0, kept.num_images - _BLOCK, 500):
        begin = time.perf_counter()
        order.locate(np.arange(position, position + _BLOCK))
        seconds.append(time.perf_counter() - begin)
    return {
        "row_groups": num_groups,
        "MB_shared": round(sum(buffer.raw().nbytes for buffer in buffers) / 1e6, 1),
        "MB_heap": round(heap / 1e6, 1),
        "ms_first_block": round(1000 * first, 1),
        "ms_block": round(1000 * float(np.median(seconds)), 3),
    }


def main() -> None:
    """Print a line for each size, and one for the target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--target", type=int, default=100_000_000)
    parser.add_argument("--row-groups", type=int, default=1_000_000)
    parser.add_argument("--here", choices=["images", "row-groups"], help="measure in this process")
    options = parser.parse_args()
    if options.here:
        found = (
            measure(options.images[0]) if options.here == "images" else measure_row_groups(options.row_groups)
        )
        print(json.dumps(found))
        return

    def measured(what: str, number: int) -> dict[str, Any]:
        command = [sys.executable, __file__, "--here", what, f"--{what}", str(number)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    found = []
    for number in options.images:
        found.append(measured("images", number))
        print(found[-1], flush=True)
    if len(found) > 1:
        low, high = sorted(found, key=lambda one: int(one["images"]))[-2:]
        more = (options.target - high["images"]) / (high["images"] - low["images"])
        values = {
            name: high[name] + more * (high[name] - low[name])
            for name in ("total", "cpu", "GB_peak", "GB_file")
        }
        print({"images": options.target, **{name: round(value, 1) for name, value in values.items()}})
    print(measured("row-groups", options.row_groups))


if __name__ == "__main__":
    main()
