"""The candidates of benchmarks/storage.py: each brings images from S3, decoded, to the process that would crop them.

A candidate is a generator of numbers of images, one number for each step that has arrived. All use one decoder, but for
`read_images`, which has its own. Pixels end where crops would be cut from them: only a number is passed on.
"""

import contextlib
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from storage_sets import ADDRESSES, FOLDER

from dinoray.pipeline.augment.augmenter import CropThreadPool
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source

_MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Spec:
    """What a candidate reads, and with how many processes."""

    bucket: str
    prefix: str
    images: int
    workers: int
    """Processes that fetch and decode."""
    batch: int
    block: int
    """Images in a block of ours."""
    cache_bytes: int
    """`data.row_group_cache_bytes` of ours."""
    folder: str = ""
    """The images as files on the disk."""
    tars: tuple[str, ...] = ()
    """Addresses of the tar files, signed."""

    @property
    def uri(self) -> str:
        return self.folder if self.prefix == FOLDER else f"s3://{self.bucket}/{self.prefix}"


def pixels(data: bytes) -> int:
    """Decode an image; return its number of pixels."""
    height, width, _ = decode(data, max_pixels=_MAX_PIXELS).shape
    return int(height * width)


def ours(spec: Spec) -> Iterator[int]:
    """Augmentation actors without their crops: blocks in turn, two under way in each, one thread that decodes."""
    config = DataConfig(
        path=spec.uri,
        uri_column="url" if spec.prefix == ADDRESSES else AUTO,
        row_group_cache_bytes=spec.cache_bytes,
    )
    source = Source(config, build_manifest(config))
    context = multiprocessing.get_context("spawn")
    arrived: Any = context.Queue()
    actors = [
        context.Process(target=_actor, args=(source, spec, rank, arrived), daemon=True)
        for rank in range(spec.workers)
    ]
    for actor in actors:
        actor.start()
    try:
        while True:
            found = arrived.get()
            if isinstance(found, str):
                raise RuntimeError(found)
            yield found
    finally:
        for actor in actors:
            actor.terminate()


def _actor(source: Source, spec: Spec, rank: int, arrived: Any) -> None:
    order, croppers = source.order(seed=0), CropThreadPool(1)

    def one(_: int, fetched: Any) -> None:
        if fetched.data is None:
            raise RuntimeError(f"{fetched.key}: {fetched.reason}")
        pixels(fetched.data)
        arrived.put(1)  # not by the block: what is under way would then be a large part of what is measured

    def block(number: int) -> None:
        first = (number * spec.workers + rank) * spec.block
        _, images = order.locate(np.arange(first, first + spec.block))
        croppers.for_each(one, source.arrivals(images.tolist()))

    try:
        with ThreadPoolExecutor(2) as calls:
            under_way = deque(calls.submit(block, number) for number in range(2))
            number = 2
            while True:
                under_way.popleft().result()
                under_way.append(calls.submit(block, number))
                number += 1
    except Exception as error:
        arrived.put(f"{type(error).__name__}: {error}")


def ray_images(spec: Spec) -> Iterator[int]:
    """Ray Data's read_images, with its own decoder; what takes the pixels is fused with the reading."""
    with _ray(spec) as data:
        images = data.read_images(spec.uri, filesystem=_arrow_s3(), mode="RGB", shuffle="files")
        yield from _counts(images, spec, lambda image: int(image.shape[0] * image.shape[1]))


def ray_parquet(spec: Spec) -> Iterator[int]:
    """Ray Data's read_parquet and our decoder."""
    with _ray(spec) as data:
        rows = data.read_parquet(spec.uri, filesystem=_arrow_s3(), columns=["image"], shuffle="files")
        yield from _counts(rows, spec, _pixels_of_row)


def _pixels_of_row(row: Any) -> int:
    return pixels(row["bytes"] if isinstance(row, dict) else row)


def _counts(dataset: Any, spec: Spec, measure: Callable[[Any], int]) -> Iterator[int]:
    # No batch size: with one, Ray does not fuse this with the reading, and would store all pixels in between.
    counted = dataset.map_batches(
        lambda batch: {"pixels": np.array([measure(image) for image in batch["image"]])}, batch_size=None
    )
    yield 0
    for batch in counted.iter_batches(batch_size=spec.batch, batch_format="numpy"):
        yield len(batch["pixels"])


@contextlib.contextmanager
def _ray(spec: Spec) -> Iterator[Any]:
    import ray
    import ray.data

    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=spec.workers, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield ray.data
        finally:
            ray.shutdown()


def _arrow_s3() -> Any:
    import pyarrow.fs

    scheme, _, address = os.environ["AWS_ENDPOINT_URL"].partition("://")
    keys = {"access_key": os.environ["AWS_ACCESS_KEY_ID"], "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"]}
    return pyarrow.fs.S3FileSystem(**keys, scheme=scheme, endpoint_override=address, region="us-east-1")


def loader_objects(spec: Spec) -> Iterator[int]:
    """A PyTorch DataLoader over a Dataset with boto3, as people write it."""
    import boto3
    from torch.utils.data import Dataset

    class Objects(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            pages = boto3.client("s3").get_paginator("list_objects_v2")
            found = pages.paginate(Bucket=spec.bucket, Prefix=f"{spec.prefix}/")
            self.keys = [item["Key"] for page in found for item in page.get("Contents", [])]
            self.client: Any = None

        def __len__(self) -> int:
            return len(self.keys)

        def __getitem__(self, index: int) -> int:
            self.client = self.client or boto3.client("s3")  # one for each worker
            answer = self.client.get_object(Bucket=spec.bucket, Key=self.keys[index])
            return pixels(answer["Body"].read())

    yield from _loaded(Objects(), spec, shuffle=True)


def loader_objects_4(spec: Spec) -> Iterator[int]:
    """As `loader_objects` with four times as many workers, which hides latency."""
    return loader_objects(replace(spec, workers=4 * spec.workers))


def loader_parquet(spec: Spec) -> Iterator[int]:
    """A PyTorch DataLoader whose workers read the row groups of Parquet in a random order, by pyarrow."""
    import pyarrow.fs
    import pyarrow.parquet as pq
    from torch.utils.data import IterableDataset, get_worker_info

    class Groups(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            s3, worker = _arrow_s3(), get_worker_info()
            selector = pyarrow.fs.FileSelector(f"{spec.bucket}/{spec.prefix}", recursive=True)
            paths = sorted(file.path for file in s3.get_file_info(selector) if file.path.endswith(".parquet"))
            files = [pq.ParquetFile(s3.open_input_file(path), pre_buffer=True) for path in paths]
            groups = [(file, i) for file in files for i in range(file.metadata.num_row_groups)]
            chance = np.random.default_rng(0)
            while True:
                for place in chance.permutation(len(groups))[worker.id :: worker.num_workers].tolist():
                    file, group = groups[place]
                    rows = file.read_row_group(group, columns=["image"])["image"].to_pylist()
                    for row in chance.permutation(len(rows)).tolist():
                        yield _pixels_of_row(rows[row])

    yield from _loaded(Groups(), spec)


def webdataset(spec: Spec) -> Iterator[int]:
    """WebDataset in a DataLoader: tar files that curl fetches, in a random order."""
    import webdataset as wds

    dataset = wds.WebDataset(
        [f"pipe:curl -sf '{url}'" for url in spec.tars], resampled=True, shardshuffle=True, empty_check=False
    )
    yield from _loaded(dataset.shuffle(500).to_tuple("jpg").map_tuple(pixels), spec)


def litdata(spec: Spec) -> Iterator[int]:
    """LitData's StreamingDataset in its StreamingDataLoader: chunks in a cache on the disk."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> int:
            return pixels(bytes(super().__getitem__(index)))  # it gives a memoryview

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Its downloader refuses a store without TLS, and no public setting allows one.
        getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = True
        options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        dataset = Decoded(spec.uri, cache_dir=folder, shuffle=True, storage_options=options)
        for batch in StreamingDataLoader(dataset, batch_size=spec.batch, num_workers=spec.workers):
            yield len(batch)


def mosaic(spec: Spec) -> Iterator[int]:
    """MosaicML's StreamingDataset in a DataLoader: shards in a cache on the disk."""
    from streaming import StreamingDataset

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return pixels(found["image"]) if isinstance(found, dict) else found

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        dataset = Decoded(remote=spec.uri, local=folder, shuffle=True, batch_size=spec.batch)
        yield from _loaded(dataset, spec)


def _loaded(dataset: Any, spec: Spec, *, shuffle: bool = False) -> Iterator[int]:
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {"shuffle": True} if shuffle else {}
    loader = DataLoader(dataset, batch_size=spec.batch, num_workers=spec.workers, **options)
    for batch in loader:
        yield len(batch[0] if isinstance(batch, list) else batch)


Candidate = Callable[[Spec], Iterator[int]]
CANDIDATES: dict[tuple[str, str], Candidate] = {
    (FOLDER, "ours"): ours,
    ("objects", "ours"): ours,
    ("objects", "Ray Data read_images"): ray_images,
    ("objects", "DataLoader, boto3"): loader_objects,
    ("objects", "DataLoader, boto3, 4x workers"): loader_objects_4,
    ("packed", "ours"): ours,
    ("packed", "Ray Data read_parquet"): ray_parquet,
    ("packed", "DataLoader, pyarrow"): loader_parquet,
    ("others", "ours"): ours,
    ("others", "Ray Data read_parquet"): ray_parquet,
    ("others", "DataLoader, pyarrow"): loader_parquet,
    ("tars", "ours"): ours,
    ("tars", "WebDataset"): webdataset,
    (ADDRESSES, "ours"): ours,
    ("litdata", "LitData"): litdata,
    ("mds", "MosaicML Streaming"): mosaic,
}
"""By set and name, in the order of the table."""
IN_LUMPS = frozenset({ray_images, ray_parquet})
"""Candidates whose images arrive in few lumps, after a step of no images: they are measured from there on."""
