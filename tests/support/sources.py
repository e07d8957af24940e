"""The source of a data set by its address, and all that it fetches."""

from dinoray.pipeline.data.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.source import Fetched, Source


def source_of(path: str, **options: object) -> Source:
    config = DataConfig.model_validate({"path": path, **options})
    return Source(config, build_manifest(config))


def fetch_all(source: Source) -> list[Fetched]:
    return source.fetch(range(source.num_images))
