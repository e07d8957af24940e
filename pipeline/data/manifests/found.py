"""What a listing of one kind of source gives to the manifest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.manifests.kinds import KindName
from dinoray.pipeline.data.manifests.manifest_file import DETECTABLE


class Found(NamedTuple):
    """The kind and the table of a manifest, the values of settings that were auto, and notes on them."""

    kind: KindName
    table: pa.Table
    detected: dict[str, Any]
    notes: list[str]
    damaged: Sequence[str] = ()
    rows_per_group: int | None = None
    root: str | None = None
    """Where the images lie, if not where the shards do."""
    num_listed: int = 0
    """Listed images that shards name."""


def settled(config: DataConfig, values: Sequence[Any]) -> dict[str, Any]:
    """Return the values of the settings that are auto."""
    found = dict(zip(DETECTABLE, values, strict=True))
    return {name: value for name, value in found.items() if getattr(config, name) == AUTO}
