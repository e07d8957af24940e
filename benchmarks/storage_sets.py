"""The image sets of benchmarks/storage.py on S3: one set of JPEG files in the layout of each candidate."""

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.export.packing import write_part
from dinoray.pipeline.export.packing_plan import make_plan
from dinoray.pipeline.storage.files import Directory

Item = TypeVar("Item")

ROWS_OF_OTHERS = 100
"""Rows of a row group in Parquet of other people: Hugging Face's `datasets` writes images so."""
_ROWS_PER_FILE = 1000
_SHARD_BYTES = 8 << 20
"""Bytes of a tar, chunk or shard in the formats of other libraries: some twenty for 1,500 images of 0.1 MB."""


@dataclass(frozen=True)
class Images:
    """Images by number; number i has the file `files[i % len(files)]`."""

    files: Sequence[bytes]
    count: int

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, file) of each image."""
        return ((f"{i:06d}.jpg", self.files[i % len(self.files)]) for i in range(self.count))

    @property
    def mean_bytes(self) -> float:
        """Mean size of an image file."""
        return sum(len(data) for _, data in self) / self.count


def put_objects(images: Images, client: Any, bucket: str) -> None:
    """Put each image as an object."""
    _put(client, bucket, ((f"objects/{name}", data) for name, data in images))


def put_packed(images: Images, client: Any, bucket: str) -> None:
    """Pack the objects as `jobs.pack` does, in this process."""
    config = DataConfig(path=f"s3://{bucket}/objects")
    source, out = Source(config, build_manifest(config)), Directory(f"s3://{bucket}/packed")
    plan = make_plan(source.manifest, digest="benchmark", max_pixels=None, rows_per_file=None)
    for part in range(plan.num_parts):
        write_part(None, source, part, out=out, plan=plan)


def put_others(images: Images, client: Any, bucket: str) -> None:
    """Write Parquet as Hugging Face's `datasets` does: a struct of bytes and path, row groups of 100."""

    def files() -> Iterator[tuple[str, bytes]]:
        for number, rows in enumerate(_chunks(images, _ROWS_PER_FILE)):
            column = [{"bytes": data, "path": name} for name, data in rows]
            sink = io.BytesIO()
            pq.write_table(pa.table({"image": column}), sink, row_group_size=ROWS_OF_OTHERS)
            yield f"others/{number:05d}.parquet", sink.getvalue()

    _put(client, bucket, files())


def put_tars(images: Images, client: Any, bucket: str) -> None:
    """Write the tar files of WebDataset."""

    def files() -> Iterator[tuple[str, bytes]]:
        for number, rows in enumerate(_chunks(images, max(1, int(_SHARD_BYTES / images.mean_bytes)))):
            sink = io.BytesIO()
            with tarfile.open(fileobj=sink, mode="w") as tar:
                for name, data in rows:
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))
            yield f"tars/{number:05d}.tar", sink.getvalue()

    _put(client, bucket, files())


def put_addresses(images: Images, client: Any, bucket: str) -> None:
    """Write Parquet of the addresses of the objects."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"url": [f"s3://{bucket}/objects/{name}" for name, _ in images]}), sink)
    _put(client, bucket, iter([(f"{ADDRESSES}/all.parquet", sink.getvalue())]))


def put_litdata(images: Images, client: Any, bucket: str) -> None:
    """Write the chunks of LitData."""
    from litdata.streaming.writer import BinaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = BinaryWriter(folder, chunk_bytes=_SHARD_BYTES)
        for number, (_, data) in enumerate(images):
            writer[number] = data
        writer.done()
        writer.merge()
        _put_folder(client, bucket, "litdata", Path(folder))


def put_mds(images: Images, client: Any, bucket: str) -> None:
    """Write the shards of MosaicML Streaming."""
    from streaming import MDSWriter

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "mds"))
        with MDSWriter(out=out, columns={"image": "bytes"}, size_limit=_SHARD_BYTES) as writer:
            for _, data in images:
                writer.write({"image": data})
        _put_folder(client, bucket, "mds", Path(out))


ADDRESSES = "addresses"
"""The set that names the objects by their addresses."""
PUTS: dict[str, Callable[[Images, Any, str], None]] = {
    "objects": put_objects,
    "packed": put_packed,
    "others": put_others,
    "tars": put_tars,
    ADDRESSES: put_addresses,
    "litdata": put_litdata,
    "mds": put_mds,
}
"""How each set is written, by its prefix in the bucket; `packed` and `addresses` are made from `objects`."""
FOLDER = "folder"
"""The set that is no prefix of the bucket, but a folder on the disk."""
NEEDS = {
    ("tars", "WebDataset"): "webdataset",
    ("litdata", "LitData"): "litdata",
    ("mds", "MosaicML Streaming"): "streaming",
}
"""The module without which a candidate, by its set and name, cannot run."""


def missing_module(candidate: tuple[str, str]) -> str | None:
    """Return the name of the module that a candidate needs and that is not installed."""
    name = NEEDS.get(candidate)
    return name if name is not None and find_spec(name) is None else None


def write_folder(images: Images, folder: Path) -> None:
    """Write each image as a file."""
    for name, data in images:
        (folder / name).write_bytes(data)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last may be shorter."""
    following = iter(items)
    while some := list(islice(following, size)):
        yield some


def _put(client: Any, bucket: str, objects: Iterator[tuple[str, bytes]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        for some in _chunks(objects, 64):  # so that few bodies are in memory
            puts = [pool.submit(client.put_object, Bucket=bucket, Key=key, Body=body) for key, body in some]
            for put in puts:
                put.result()


def _put_folder(client: Any, bucket: str, prefix: str, folder: Path) -> None:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    _put(client, bucket, ((f"{prefix}/{path.relative_to(folder)}", path.read_bytes()) for path in paths))
