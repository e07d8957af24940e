"""The manifest as a table and as a file: all images of a data set in one fixed order. Lists nothing; no Ray here."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.pipeline.data.config import PLUS, DataConfig
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.listing.ignored import OTHER_KINDS, Ignored
from dinoray.pipeline.data.manifests.kinds import KINDS, Kind, KindName, plain, with_texts_once
from dinoray.pipeline.storage.files import normal_uri

_VERSION = 1
_METADATA = b"dinoray.manifest"
DETECTABLE = ("image_column", "key_column", "label_column", "label_from_parent", "uri_column")
_LISTED_AS = ("path", *DETECTABLE, "include", "exclude", "image_list", "label_level")
_OF_SOURCE = "manifest"
"""Column of a mixture's file: the bytes of each source's own manifest."""
UNKNOWN_BYTES = 1 << 20
"""Of an image whose size is not listed."""


@dataclass(frozen=True)
class Manifest:
    """All images of a data set in one fixed order; an image is its index in [0, num_images).

    `root` is the address that keys are relative to (`s3://bucket` or a folder). `num_ignored` counts listed
    objects that are no images. `listed_as` has the config values that determine the table, `detected` the
    values found for its auto settings, `notes` messages about them. `damaged` are keys of Parquet or tar files that
    could not be read and are left out. `rows_per_group` is set for a packed set, whose rows lie shuffled in row
    groups of that many, or fewer at the ends of shards. `ignored` has those objects by kind, of a bounded number.
    `sources` are the manifests of a mixture, whose images are numbered one source after the other; it has no root.
    """

    table: pa.Table
    kind: KindName
    root: str
    num_ignored: int
    listed_as: dict[str, Any]
    detected: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    rows_per_group: int | None = None
    ignored: tuple[Ignored, ...] = ()
    sources: "tuple[Manifest, ...]" = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", with_texts_once(self.table, self.of_kind.texts_once))

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "_groups"
        }  # made again from the table

    @property
    def of_kind(self) -> Kind:
        """What the rows of the table are."""
        return KINDS[self.kind]

    def settle(self, config: DataConfig) -> DataConfig:
        """Return `config` with its auto settings replaced by the values of this manifest."""
        values = {name: value for name, value in self._values.items() if getattr(config, name) == AUTO}
        return config.model_copy(update=values)

    @property
    def _values(self) -> dict[str, Any]:
        return {name: self.listed_as.get(name) for name in DETECTABLE} | self.detected

    @property
    def path(self) -> str:
        """The data set's address: `data.path`, normalised."""
        return str(self.listed_as["path"])

    @property
    def num_images(self) -> int:
        """Number of images: of rows, or of images in all groups, or of all sources."""
        if self.sources:
            return sum(one.num_images for one in self.sources)
        sizes = self.group_sizes
        return self.table.num_rows if sizes is None else int(sizes.sum())

    @property
    def group_sizes(self) -> NDArray[np.int64] | None:
        """Images per group, int64 [num_groups]: a row group, or a chunk of a tar file; None for image objects.

        In a mixture, image objects of a source stand as one group of no bytes: each of them is read alone.
        """
        return None if self._groups is None else self._groups[0]

    @property
    def group_bytes(self) -> NDArray[np.int64] | None:
        """Bytes per group in memory, int64 [num_groups]; None for image objects."""
        return None if self._groups is None else self._groups[1]

    @cached_property
    def _groups(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        if not self.sources:
            return self.of_kind.groups(self.table)
        groups = [one._groups or (np.array([one.num_images]), np.array([0])) for one in self.sources]
        if all(one.group_sizes is None for one in self.sources):
            return None
        sizes, num_bytes = (np.concatenate(each).astype(np.int64) for each in zip(*groups, strict=True))
        return sizes, num_bytes

    @property
    def group_ends(self) -> NDArray[np.int64]:
        """The number after the last group of each source, int64 [num_sources]; of one, unless this is a mixture."""
        each = (1 if one.group_sizes is None else len(one.group_sizes) for one in self.sources or (self,))
        return np.cumsum([*each])

    @property
    def weights(self) -> list[float]:
        """The weight of each source of a mixture."""
        return list(self.table["weight"].to_pylist())

    @property
    def names(self) -> list[str]:
        """A short name of each source of a mixture, with which the keys of its images begin."""
        return list(self.table["name"].to_pylist())

    @property
    def labels(self) -> pa.ChunkedArray | None:
        """The label of each image, null without one; None for Parquet and mixtures, which have no row per image."""
        return None if self.of_kind.has_columns or self.sources else self.table["label"]

    @property
    def objects(self) -> pa.Table:
        """Key, size and ETag (and more) of each image object, or of each Parquet or tar file that has images."""
        return self.of_kind.objects(self.table)

    @property
    def object_sizes(self) -> np.ndarray:
        """Bytes of each image object, int64 [num_images]; where they are not listed, the mean of the others."""
        sizes = self.table["size"]
        if not sizes.null_count:
            return sizes.to_numpy()
        known = sizes.drop_null()
        mean = int(known.to_numpy().mean()) if len(known) else UNKNOWN_BYTES
        return sizes.fill_null(mean).to_numpy()

    def row_group(self, number: int) -> dict[str, Any]:
        """Return a row of the table, of Parquet, by column. One at a time: there may be a million."""
        return dict(self.table.slice(number, 1).to_pylist()[0])

    def uri(self, key: str) -> str:
        """Return the full address of the object or file at `key`."""
        if key.startswith("s3://") and self._values.get("uri_column") is not None:
            return key  # in another bucket than most
        return f"{self.root.rstrip('/')}/{key}"

    def to_bytes(self) -> bytes:
        """Return the bytes of a Parquet file, which `from_bytes` and any Parquet reader can read."""
        about = {
            "version": _VERSION,
            "kind": self.kind,
            "root": self.root,
            "num_ignored": self.num_ignored,
            "listed_as": self.listed_as,
            "detected": self.detected,
            "notes": self.notes,
            "damaged": self.damaged,
            "rows_per_group": self.rows_per_group,
            "ignored": self.ignored,
        }
        sink = pa.BufferOutputStream()
        table = plain(self.table)
        if self.sources:
            of_sources = pa.array([one.to_bytes() for one in self.sources], pa.large_binary())
            table = table.append_column(_OF_SOURCE, of_sources)
        table = table.replace_schema_metadata({_METADATA: json.dumps(about)})
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, data: bytes, config: DataConfig, *, has_begun: bool = True) -> "Manifest":
        """Return the manifest in `data`. Raises ConfigError if it was listed with values not in `config`.

        If the run `has_begun`, a setting that is auto in `config` accepts any value of the manifest.
        """
        manifest = cls.read(data, "the manifest", f"delete it to list {config.path} again")
        for name, now, then in manifest.misfits(config, auto_fits=has_begun):
            raise ConfigError(
                f"data.{name}={now!r}, but the manifest of this run was listed with {then!r}; "
                "give the run another name, or set the old value"
            )
        return manifest

    def misfits(self, config: DataConfig, *, auto_fits: bool) -> Iterator[tuple[str, Any, Any]]:
        """Yield (setting, value in `config`, value of this manifest) of the settings that decide the table and differ.

        With `auto_fits`, a setting that is auto in `config` fits any value.
        """
        for name, now in listed_as(config).items():
            then = self.listed_as.get(name, default_of(name))
            found = self.detected.get(name, then)
            if now not in (then, found) and not (now == AUTO and auto_fits):
                yield name, now, found

    @classmethod
    def read(cls, data: bytes, what: str, remedy: str) -> "Manifest":
        """Return the manifest in `data`, whatever it lists. DataError, with `what` and `remedy`, if it is none."""
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            about = json.loads(file.schema_arrow.metadata[_METADATA])
            columns = [file.read(columns=[n]).combine_chunks()[n] for n in file.schema_arrow.names]
            table = pa.table(columns, file.schema_arrow.names)
        except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{what} is damaged ({one_line(error, limit=200)}); {remedy}") from error
        if about["version"] != _VERSION:
            raise DataError(f"{what} has version {about['version']}, this program reads {_VERSION}; {remedy}")
        listed, detected = about["listed_as"], about.get("detected", {})
        sources: tuple[Manifest, ...] = ()
        if _OF_SOURCE in table.column_names:
            sources = tuple(cls.read(one.as_py(), what, remedy) for one in table[_OF_SOURCE])
            table = table.drop_columns(_OF_SOURCE)
        kept = (table, about["kind"], about["root"], about["num_ignored"])
        notes, damaged = (tuple(about.get(name, ())) for name in ("notes", "damaged"))
        rows = about.get("rows_per_group")
        return cls(*kept, listed, detected, notes, damaged, rows, _ignored(about), sources)

    @classmethod
    def mixture(cls, config: DataConfig, sources: Sequence["Manifest"]) -> "Manifest":
        """Return the manifest of a mix of `sources`, in the order of `config.mix`, whose weights it keeps."""
        weights, paths = list(config.mix.values()), [one.path for one in sources]
        table = pa.table(
            {"path": pa.array(paths), "name": _names(paths), "weight": pa.array(weights, pa.float64())}
        )
        num_ignored = sum(one.num_ignored for one in sources)
        return cls(table, "mixture", "", num_ignored, listed_as(config), sources=tuple(sources))


def _names(paths: Sequence[str]) -> list[str]:
    """Return a short name for each source: the last part of its path, unless others end in it too."""
    last = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return [name if name and last.count(name) == 1 else path for name, path in zip(last, paths, strict=True)]


def _ignored(about: dict[str, Any]) -> tuple[Ignored, ...]:
    """Return the field `ignored`, or what earlier versions wrote: a number, and phrases such as `1 study ...`."""
    if "ignored" in about:
        return tuple(Ignored(kind, number, tuple(names)) for kind, number, names in about["ignored"])
    phrases = [phrase.partition(" ") for phrase in about.get("passed_over", ())]
    others = [Ignored(OTHER_KINDS, about["num_ignored"])] if about["num_ignored"] else []
    return (*others, *(Ignored(what, int(number)) for number, _, what in phrases))


def listed_as(config: DataConfig) -> dict[str, Any]:
    """Return the settings that decide the table of a manifest, as JSON gives them back."""
    values = config.model_dump(mode="json", include=set(_LISTED_AS))
    listed = {name: values[name] for name in _LISTED_AS}
    if not config.mix:
        return listed | {"path": normal_uri(config.path)}
    mix = {normal_uri(path): weight for path, weight in config.mix.items()}
    return listed | {"path": PLUS.join(mix), "mix": mix}


def default_of(name: str) -> Any:
    """Return the value of a setting that nobody has set, as in manifests from before there was the setting."""
    default = DataConfig.model_fields[name].get_default()
    return list(default) if isinstance(default, tuple) else default
