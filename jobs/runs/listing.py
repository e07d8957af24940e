"""The command manifest: list, compare with the newest manifest, write, and print what there is."""

import re
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from dinoray.jobs.cli.config import apply_overrides, validate
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.data_lines import data_lines
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.manifests.changes import changes_between
from dinoray.pipeline.data.manifests.manifest import Manifest, build_manifest
from dinoray.pipeline.data.manifests.manifest_file import default_of
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage.files import Directory, check_writable, normal_uri
from dinoray.pipeline.storage.listing_parts import resumable
from dinoray.pipeline.worker.config import Config

_ARGUMENT = "argument data"
_SIZES = {"10 kB": 10**4, "100 kB": 10**5, "1 MB": 10**6, "10 MB": 10**7}
_MOST_SUFFIXES, _MOST_EXAMPLES = 6, 3


def write_manifest(arguments: Namespace) -> None:
    """List the data and write NAME-0001.parquet, or the next number if the newest manifest differs."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    config, out = _config(arguments), Directory(arguments.out)
    if f"{out.uri}/".startswith(f"{normal_uri(config.data.path)}/"):
        raise ConfigError(
            f"--out={arguments.out} lies in {config.data.path}, where it would be listed; choose another --out"
        )
    check_writable(out.uri, setting="--out")
    number = newest_number(out.list(), arguments.name)
    old = _newest(out, arguments.name, number, config) if number else None
    with resumable(out) as parts:
        manifest = build_manifest(config.data, config.storage, setting=_ARGUMENT, parts=parts)
    for line in data_lines(Source(config.data, manifest, config.storage)):
        console.print(line)
    for line in describe_objects(manifest, most_bytes=config.data.max_object_bytes):
        console.print(line)
    if old is not None and _is_same(old, manifest):
        console.print(f"nothing has changed since {out.join(file_name(arguments.name, number))}")
    else:
        number += 1
        out.write(file_name(arguments.name, number), manifest.to_bytes())
        console.print(f"manifest: {out.join(file_name(arguments.name, number))}")
    parts.forget()
    if old is not None and not _is_same(old, manifest):
        for line in describe_changes(old, manifest, since=file_name(arguments.name, number - 1)):
            console.print(line)
    settings = (f"data.path={manifest.path}", f"data.manifest={out.join(file_name(arguments.name, number))}")
    console.print(f"to train on exactly these images: {command('pretrain', *settings)}")


def file_name(name: str, number: int) -> str:
    """`photos-0001.parquet`."""
    return f"{name}-{number:04}.parquet"


def newest_number(names: list[str], name: str) -> int:
    """Return the highest number of the manifests called `name` among the names of a folder; 0 without any."""
    found = (re.fullmatch(rf"{re.escape(name)}-(\d{{4,}})\.parquet", one) for one in names)
    return max((int(match[1]) for match in found if match), default=0)


def describe_objects(manifest: Manifest, *, most_bytes: int) -> Iterator[str]:
    """Yield lines on the objects by the ends of their names and by size; those above `most_bytes` are not read."""
    table = manifest.objects
    if manifest.group_sizes is not None:
        yield f"{manifest.of_kind.group}s: {len(manifest.group_sizes):,}"
    suffixes = pc.struct_field(pc.extract_regex(table["key"], r"(?P<suffix>\.[^./]{1,12})$"), "suffix")
    counts = pc.value_counts(pc.fill_null(pc.utf8_lower(suffixes), "without suffix")).to_pylist()
    counts.sort(key=lambda one: (-one["counts"], one["values"]))
    shown = [f"{one['counts']:,} {one['values']}" for one in counts[:_MOST_SUFFIXES]]
    more = sum(one["counts"] for one in counts[_MOST_SUFFIXES:])
    yield "names: " + ", ".join(shown + ([f"{more:,} others"] if more else []))
    if "storage_class" in table.column_names and table["storage_class"].null_count < table.num_rows:
        classes = pc.value_counts(table["storage_class"].fill_null("STANDARD")).to_pylist()
        yield "storage classes: " + ", ".join(f"{one['counts']:,} {one['values']}" for one in classes)
    sizes = table["size"].drop_null().to_numpy()
    edges = [*_SIZES.values()]
    numbers = np.bincount(np.searchsorted(edges, sizes, side="right"), minlength=len(edges) + 1).tolist()
    labels = [f"below {one}" for one in _SIZES] + [f"{[*_SIZES][-1]} or more"]
    ranges = [f"{count:,} {label}" for count, label in zip(numbers, labels, strict=True) if count]
    yield f"sizes: {', '.join(ranges)}; {int(sizes.sum()) / 1e9:,.3f} GB in all"
    empty, large = int((sizes == 0).sum()), int((sizes > most_bytes).sum())
    if manifest.kind == "images" and (empty or large):
        yield f"bad images: {empty:,} empty, {large:,} larger than data.max_object_bytes={most_bytes}"


def describe_changes(old: Manifest, new: Manifest, *, since: str) -> Iterator[str]:
    """Yield lines on the keys that are new, gone and changed since a manifest, with a few of each."""
    changes = changes_between(old, new)
    counts = ", ".join(f"{len(keys):,} {what}" for what, keys in zip(changes._fields, changes, strict=True))
    yield f"since {since}: {counts}"
    for what, keys in zip(changes._fields, changes, strict=True):
        if len(keys):
            yield f"  {what}: {_some(keys)}"
    values = {name: new.detected.get(name, then) for name, then in new.listed_as.items()}
    for name, now in values.items():
        then = old.detected.get(name, old.listed_as.get(name, default_of(name)))
        if then != now:
            yield f"  data.{name}: {then} -> {now}"


def _some(keys: pa.ChunkedArray) -> str:
    shown = ", ".join(keys.slice(0, _MOST_EXAMPLES).to_pylist())
    more = len(keys) - _MOST_EXAMPLES
    return f"{shown} and {more:,} more" if more > 0 else shown


def _config(arguments: Namespace) -> Config:
    """Settings for `arguments.data` with the overrides; what is not in data and storage is of no account."""
    tree = {**RECIPES["demo"](), "name": "manifest", "recipe": "demo", "data": {"path": arguments.data}}
    config = validate(apply_overrides(tree, arguments.overrides))
    if config.data.manifest is not None or config.data.path != arguments.data:
        raise ConfigError(
            f"data.path and data.manifest cannot be set here: what is listed is {arguments.data}, the first argument; "
            "leave them out"
        )
    return config


def _newest(out: Directory, name: str, number: int, config: Config) -> Manifest:
    file = out.join(file_name(name, number))
    old = Manifest.read(out.read(file_name(name, number)), file, "delete it")
    if old.path != normal_uri(config.data.path):
        raise ConfigError(
            f"{_ARGUMENT}={config.data.path}, but {file} lists {old.path}; choose another --name or --out"
        )
    return old


def _is_same(old: Manifest, new: Manifest) -> bool:
    return old.kind == new.kind and old.detected == new.detected and old.table.equals(new.table)
