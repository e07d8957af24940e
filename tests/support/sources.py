"""The source of a data set by its address, and all that it fetches."""

import random

from samples import parquet

from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Fetched, Source

IMAGES = {f"{label}/{n}.jpg": random.Random(label).randbytes(500 + n) for label in "ab" for n in range(9)}


def as_shard(images: dict[str, bytes], *, row_group_size: int = 4) -> bytes:
    """A Parquet file of these images, whose column is called jpeg, among others."""
    labels = [key.split("/")[0] for key in images]
    columns = {"unused": labels, "name": list(images), "jpeg": list(images.values()), "class": labels}
    return parquet(columns, row_group_size=row_group_size)


def source_of(path: str, **options: object) -> Source:
    config = DataConfig.model_validate({"path": path, **options})
    return Source(config, build_manifest(config))


def fetch_all(source: Source) -> list[Fetched]:
    return source.fetch(range(source.num_images))
