"""Settings of the images of a run: where they are, how they are fetched and decoded, and when one is bad."""

import json
import math
import re
from collections import Counter
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dinoray.models.settings import Auto, Settings
from dinoray.pipeline.storage.addresses import normal_uri

PLUS = " + "
"""Between the sources of a mix, where they stand in place of a path."""
_LEAST_SHARE = 1e-5
"""Of a source in a mix: one image in 100,000."""
_PLAIN = re.compile(r"(s3://)?[\w./+@-]+")
"""Paths that YAML reads as they stand, in a mapping too."""


class PixelsConfig(Settings):
    """What becomes pixels of the samples in an image file: a part of `data` that a checkpoint keeps."""

    channels: int = Field(default=3, ge=1, le=16)
    """Channels of a picture: 3 makes RGB of gray and of transparency; others are taken as they are in the files."""
    page: int | Literal["channels"] = Field(default=0)
    """TIFF: the page that is read, from 0; channels: all pages, as channels of one picture."""
    value_range: tuple[float, float] | Auto | None = "auto"
    """[low, high]: samples of 16 bits or more that become 0 and 255; auto measures; null: the high byte of 16 bits."""

    @field_validator("page")
    @classmethod
    def _is_a_page(cls, page: int | Literal["channels"]) -> int | Literal["channels"]:
        if isinstance(page, int) and page < 0:
            raise ValueError(f"{page} must be 0 (the first page) or more, or channels")
        return page

    @field_validator("value_range")
    @classmethod
    def _rises(cls, value: tuple[float, float] | Auto | None) -> tuple[float, float] | Auto | None:
        if isinstance(value, tuple) and not -math.inf < value[0] < value[1] < math.inf:
            raise ValueError(f"{list(value)} must be [low, high] with low < high, e.g. [0, 4095] for 12 bits")
        return value


class DataConfig(PixelsConfig):
    """Images: where they are and how they are fetched. Credentials and endpoint come from AWS_* alone."""

    path: str = Field(min_length=1)
    """A folder or s3://bucket/prefix of images, of Parquet shards or of tar files, or one file of these."""
    mix: dict[str, float] = Field(default={})
    """Several sources instead of `path`, {path: weight}: the weight is the share of a source in each step's images."""
    manifest: str | None = Field(default=None, min_length=1)
    """A file of the command manifest, local or s3://, whose list of images is used; null lists `path`."""
    include: tuple[str, ...] = ()
    """Patterns such as *.jpg, train or a/**/b of the keys below `path` that are used; none uses all."""
    exclude: tuple[str, ...] = ()
    """Patterns of keys below `path` that are not used, whatever `include` has; a pattern also matches folders."""
    image_list: str | None = Field(default=None, min_length=1)
    """CSV or Parquet, local or s3://, with a column of keys below `path`: only these images; and one of labels."""
    image_column: str = "auto"
    """Parquet: the column of encoded images, binary or {bytes, path}; tar: their extension, as jpg; auto detects it."""
    key_column: str | None = "auto"
    """Parquet or image_list: the column that names an image; null names it shard#row, auto detects the column."""
    label_column: str | None = "auto"
    """Parquet, image_list: a column; tar: an extension, as cls, or json.FIELD; null: no labels; auto detects it."""
    uri_column: str | None = "auto"
    """Parquet: the column of addresses of images, which are objects (s3://, paths); null: none; auto detects it."""
    label_from_parent: bool | Auto = "auto"
    """The name of the folder that holds an image, or a Parquet shard, is its label; auto looks at the folders."""
    label_level: int | str = -1
    """The folder whose name is the label: -1 the parent, 0 the top one below `path`; NAME is for folders NAME=LABEL."""
    fetch_concurrency: int = Field(default=64, ge=16, le=512)
    """Images that each augmentation actor, or row groups and chunks of tar that each reader, requests at once."""
    fetch_buffer_bytes: int = Field(default=256 << 20, ge=1)
    """Bytes of images, or row groups, that are fetched ahead for a block; an augmentation actor has two blocks."""
    streams: int = Field(default=1, ge=1)
    """Ray Data executions among which the train workers of a run are divided; one brings about 7,000 images/s."""
    stall_seconds: float = Field(default=60, gt=0)
    """Seconds without images after which a run says why, every 30 s, for at most resources.wait_for_nodes_minutes."""
    if_overwritten: Literal["bad", "use"] = "bad"
    """Objects that were overwritten after they were listed: bad counts them as bad images, use trains on them."""
    max_object_bytes: int = Field(default=64 << 20, ge=1)
    """Larger image objects are not read; they count as bad images."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Images with more pixels are not decoded; they count as bad images."""
    row_group_cache_bytes: int = Field(default=256 << 20, ge=0)
    """Parquet, tar: bytes of row groups or chunks shuffled together, and cached by an actor that reads for itself."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Maximum fraction of bad images in the latest one or two epochs (or 100,000 images); more than one end a run."""

    @property
    def from_folders(self) -> bool | Auto:
        """True if folder names are labels by the settings, auto if that is to be detected."""
        return self.label_from_parent if self.label_level == -1 else True

    @property
    def address(self) -> str:
        """What gives the images, as a setting: data.path=photos, or data.mix={photos: 0.7, web: 0.3}."""
        if not self.mix:
            return f"data.path={self.path}"
        shown = (
            f"{path if _PLAIN.fullmatch(path) else json.dumps(path)}: {weight:.12g}"
            for path, weight in self.mix.items()
        )
        return f"data.mix={{{', '.join(shown)}}}"

    @property
    def setting(self) -> str:
        """The setting that gives the images."""
        return "data.mix" if self.mix else "data.path"

    @property
    def each_source(self) -> "list[DataConfig]":
        """The settings of each source of a mix, or these settings, if there is one source."""
        if not self.mix:
            return [self]
        return [self.model_copy(update={"path": path, "mix": {}}) for path in self.mix]

    @model_validator(mode="before")
    @classmethod
    def _path_or_mix(cls, tree: Any) -> Any:
        """Name a mix by its sources where a path is shown, as `photos + web`."""
        if not isinstance(tree, dict) or "mix" not in tree:
            return tree
        mix, path = tree["mix"] or {}, tree.get("path")
        if not mix or not isinstance(mix, dict):
            return {**tree, "mix": mix}
        if path is not None and PLUS not in str(path):
            raise ValueError(
                f"data.path={path} and data.mix name images both; leave out data.path, or set data.mix=null"
            )
        return {**tree, "path": PLUS.join(sorted(map(str, mix)))}

    @model_validator(mode="after")
    def _mixes_sources(self) -> "DataConfig":
        if not self.mix:
            return self
        paths = Counter(map(normal_uri, self.mix))
        if len(paths) < len(self.mix):
            twice = paths.most_common(1)[0][0]
            raise ValueError(f"{self.address} names {twice} twice; leave out one of them")
        if len(paths) < 2:
            raise ValueError(f"{self.address} names one source; set data.path={self.path} and data.mix=null")
        for path, weight in self.mix.items():
            if not weight >= _LEAST_SHARE * sum(self.mix.values()):
                raise ValueError(
                    f"{self.address}: {path} has the weight {weight:g}, but must have at least {_LEAST_SHARE:g} of "
                    "all; raise it, or leave the source out"
                )
        for name in ("manifest", "image_list"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"data.{name}={getattr(self, name)} is of one source, but data.mix has {len(paths)}; leave it out, "
                    "or set data.path to one source and data.mix=null"
                )
        return self

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_pattern_is_a_list_too(cls, patterns: Any) -> Any:
        return (patterns,) if isinstance(patterns, str) else patterns

    @model_validator(mode="after")
    def _folders_have_labels(self) -> "DataConfig":
        if self.label_level != -1 and self.label_from_parent is False:
            raise ValueError(
                f"data.label_level={self.label_level} with data.label_from_parent=false: leave out one of them"
            )
        return self

    @field_validator("mix")
    @classmethod
    def _paths_are_addresses(cls, mix: dict[str, float]) -> dict[str, float]:
        for path in mix:
            cls._holds_no_keys(path)
            normal_uri(path)
        return dict(sorted(mix.items()))  # the same run, however it is written

    @field_validator("path", "manifest", "image_list")
    @classmethod
    def _path_is_an_address(cls, path: str | None) -> str | None:
        if path is not None:
            normal_uri(path)
        return path
