"""Vectors of a data set as Parquet parts that are written once, each whole: what a part is, and what all of them are.

A directory of embeddings, local or on S3:

    part-00000.parquet        key, vector, label?, patch_tokens?; its schema's metadata names its unreadable images
    _about/                   readers of Parquet folders pass over names that begin so
      embed.json              what decided the vectors: another command is refused
      manifest.parquet        the images, listed once: row r of it belongs to part r // rows_per_file
      quarantine.jsonl        the unreadable images of all parts
      summary.json            written last: rows in, vectors out, quarantined

A part is committed by its one atomic write, quarantine included, so what lies there is progress. No Ray here.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from models.backbone import embed_dim
from models.settings import ConfigError, DataError, one_line
from pipeline.checkpoint import Frozen
from pipeline.crops import CropsConfig
from pipeline.decode import eval_crop
from pipeline.features import embed
from pipeline.frozen import has_tokens, with_patches
from pipeline.loading import load_batches
from pipeline.source import Source
from pipeline.storage import Directory, MissingObject, filesystem

SETTINGS, MANIFEST, QUARANTINE, SUMMARY = (
    "_about/embed.json",
    "_about/manifest.parquet",
    "_about/quarantine.jsonl",
    "_about/summary.json",
)
Dtype = Literal["float16", "float32"]
Precision = Literal["fp32", "bf16"]

_PART = re.compile(r"part-(\d{5,})\.parquet")
_METADATA = b"dinoray.embeddings"
_AIM_BYTES, _MOST_BYTES = 64 << 20, 1 << 30


@dataclass(frozen=True)
class Plan:
    """All that decides what is in the parts, beside the images. `weights` identifies the network."""

    weights: str
    embed_dim: int
    num_patches: int
    """Patch tokens per image; 0: they are not kept."""
    image_size: int
    dtype: Dtype
    precision: Precision
    batch_size: int
    rows_per_file: int
    with_labels: bool

    def num_parts(self, num_images: int) -> int:
        """How many parts the images of a manifest make."""
        return -(-num_images // self.rows_per_file)

    def rows(self, part: int, num_images: int) -> range:
        """The manifest's rows that a part holds."""
        return range(part * self.rows_per_file, min((part + 1) * self.rows_per_file, num_images))

    def schema(self) -> pa.Schema:
        """Columns of every part."""
        number = pa.float16() if self.dtype == "float16" else pa.float32()
        fields = {"key": pa.string(), "vector": pa.list_(number, self.embed_dim)}
        if self.with_labels:
            fields["label"] = pa.string()
        if self.num_patches:
            fields["patch_tokens"] = pa.list_(number, self.num_patches * self.embed_dim)
        return pa.schema(fields)


class Written(NamedTuple):
    """A part as it was written: images that became vectors, and unreadable ones."""

    part: int
    num_vectors: int
    num_bad: int


def weights_digest(network: Frozen) -> str:
    """Identity of what a network computes: a digest of its weights, its architecture and its pixel scale."""
    crops = network.config.crops
    architecture = network.config.backbone.model_dump(mode="json"), crops.pixel_mean, crops.pixel_std
    digest = hashlib.blake2b(json.dumps(architecture, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(network.weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure(network: Frozen, image_size: int, *, patch_tokens: bool) -> tuple[int, int]:
    """(embed_dim, number of patch tokens to keep) at this size; ConfigError when there are no patch tokens."""
    backbone = network.backbone()
    width = embed_dim(backbone)
    if not patch_tokens:
        return width, 0
    if not has_tokens(backbone):
        raise ConfigError(
            f"--patch-tokens: {network.config.backbone.name} is no vision transformer; leave the option out"
        )
    with torch.no_grad():
        return width, with_patches(backbone, torch.zeros(1, 3, image_size, image_size)).shape[1] // width - 1


def choose_rows_per_file(asked: int | None, *, row_bytes: int, num_images: int) -> int:
    """`asked` if its parts are bounded, else some 64 parts of 256 to 10,000 rows and at most 64 MiB."""
    if asked is None:
        most = max(1, min(10_000, _AIM_BYTES // row_bytes))
        return min(most, max(256, -(-num_images // 64)))
    if asked * row_bytes > _MOST_BYTES:
        raise ConfigError(
            f"--rows-per-file {asked} makes parts of {asked * row_bytes >> 20} MiB, which are held in memory; "
            f"at most {_MOST_BYTES // row_bytes} rows fit 1 GiB"
        )
    return asked


def check_settings(out: Directory, settings: dict[str, Any]) -> bool:
    """Whether `out` was begun with these settings (those it knows of); False for an empty one.

    ConfigError, naming what differs, when it holds vectors of other settings, or parts that nothing explains.
    """
    try:
        known = json.loads(out.read(SETTINGS))
    except MissingObject:
        if any(_PART.fullmatch(name) for name in out.list()):
            raise ConfigError(
                f"{out.uri} holds parts but no {SETTINGS}; choose another --out, or remove them"
            ) from None
        return False
    except ValueError as error:
        raise DataError(f"{out.join(SETTINGS)} is damaged ({error}); choose another --out") from error
    differ = [f"{k}={known.get(k)!r}, not {v!r}" for k, v in settings.items() if known.get(k) != v]
    if differ:
        raise ConfigError(
            f"{out.uri} holds vectors made with {'; '.join(differ)}; set it back, or choose another --out"
        )
    return True


def missing_parts(out: Directory, num_parts: int) -> list[int]:
    """Numbers of the parts that are not there, ascending."""
    there = {int(match[1]) for name in out.list() if (match := _PART.fullmatch(name))}
    return [part for part in range(num_parts) if part not in there]


def part_name(part: int) -> str:
    """File name of a part."""
    return f"part-{part:05d}.parquet"


def write_part(
    backbone: nn.Module, source: Source, part: int, *, out: Directory, crops: CropsConfig, plan: Plan
) -> Written:
    """Embed the images of one part and write it, in one step.

    DataError when storage refuses us, or the vectors are not finite in the asked dtype.
    """
    rows = plan.rows(part, source.num_images)
    keys: list[str] = []
    labels: list[str | None] = []
    vectors: list[NDArray[np.floating]] = []
    quarantined: list[dict[str, Any]] = []
    position = rows.start
    for batch in load_batches(
        source, rows, lambda image, _: eval_crop(image, size=plan.image_size), batch_size=plan.batch_size
    ):
        pixels = []
        for image in batch:
            if image.pixels is None:
                record = {"key": image.key, "status": image.status.name.lower(), "reason": image.reason}
                quarantined.append({"row": position, **record})
            else:
                keys.append(image.key)
                labels.append(image.label)
                pixels.append(image.pixels)
            position += 1
        if pixels:
            vectors.append(_vectors(backbone, np.stack(pixels), keys[-len(pixels) :], crops, plan))
    about = {"part": part, "first_row": rows.start, "num_rows": len(rows), **_facts(plan)}
    table = _table(keys, labels, vectors, plan).replace_schema_metadata(
        {_METADATA: json.dumps({**about, "quarantined": quarantined})}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    out.write(part_name(part), sink.getvalue().to_pybytes())
    return Written(part, len(keys), len(quarantined))


def collect(
    out: Directory, plan: Plan, num_images: int, parts: Iterable[int]
) -> tuple[int, list[dict[str, Any]]]:
    """(vectors, quarantined images by row) of `parts`, as their files say; also written to quarantine.jsonl.

    Reads each part's footer alone. DataError for a part that is damaged, of other weights, or does not account
    for each of its rows: rows in = vectors out + quarantined.
    """
    storage, path = filesystem(out.uri)

    def read(part: int) -> tuple[int, list[dict[str, Any]]]:
        name = part_name(part)
        try:
            with storage.open_input_file(f"{path}/{name}") as file, pq.ParquetFile(file) as parquet:
                num_vectors = parquet.metadata.num_rows
                about = json.loads(parquet.schema_arrow.metadata[_METADATA])
        except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
            reason = one_line(error)
            raise DataError(f"{out.join(name)} cannot be read ({reason}); delete it and run again") from error
        rows, bad = plan.rows(part, num_images), about["quarantined"]
        told = about["part"], about["first_row"], about["num_rows"], about["weights"]
        if told != (part, rows.start, len(rows), plan.weights) or num_vectors + len(bad) != len(rows):
            raise DataError(
                f"{out.join(name)}: {len(rows)} rows in, but {num_vectors} vectors out and {len(bad)} "
                f"quarantined of part {told[0]}; delete it and run again"
            )
        return num_vectors, bad

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, parts))
    bad = [record for _, records in found for record in records]
    out.write(QUARANTINE, "".join(json.dumps(record) + "\n" for record in bad).encode())
    return sum(count for count, _ in found), bad


def check_bad(num_bad: int, num_images: int, *, limit: float, out: Directory) -> None:
    """DataError when more than this share of all images could not be used."""
    if num_bad > limit * num_images:
        raise DataError(
            f"{num_bad} of {num_images} images could not be used, more than data.max_bad_fraction={limit}; "
            f"they are named in {out.join(QUARANTINE)}; data.max_bad_fraction={_enough(num_bad / num_images):g} "
            "would do without them, and what is embedded already stays"
        )


def _enough(share: float) -> float:
    """The least whole number of percent that allows for `share`."""
    return math.ceil(share * 100) / 100


def _facts(plan: Plan) -> dict[str, Any]:
    """What a reader of one part may want to know: patch_tokens is a row of num_patches * embed_dim numbers."""
    facts = asdict(plan)
    return {k: facts[k] for k in ("weights", "embed_dim", "num_patches", "image_size", "precision")}


def _vectors(
    backbone: nn.Module, images: NDArray[np.uint8], keys: Sequence[str], crops: CropsConfig, plan: Plan
) -> NDArray[np.floating]:
    """[n, (1 + num_patches) * embed_dim] in the asked dtype, finite."""
    forward = with_patches if plan.num_patches else None
    with np.errstate(over="ignore"):
        rows = embed(backbone, images, crops, precision=plan.precision, forward=forward).astype(plan.dtype)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DataError(
            f"the vector of {keys[int(finite.argmin())]} is not finite as {plan.dtype}; "
            f"{'try --dtype float32' if plan.dtype == 'float16' else 'the checkpoint is damaged'}"
        )
    return rows


def _table(
    keys: list[str], labels: list[str | None], vectors: list[NDArray[np.floating]], plan: Plan
) -> pa.Table:
    schema = plan.schema()
    width = (1 + plan.num_patches) * plan.embed_dim
    rows = np.concatenate(vectors) if vectors else np.empty((0, width), plan.dtype)

    def fixed(values: NDArray[np.floating], name: str) -> pa.Array:
        kind = schema.field(name).type
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind.value_type), kind.list_size)

    columns = {"key": pa.array(keys, pa.string()), "vector": fixed(rows[:, : plan.embed_dim], "vector")}
    if plan.with_labels:
        columns["label"] = pa.array(labels, pa.string())
    if plan.num_patches:
        columns["patch_tokens"] = fixed(rows[:, plan.embed_dim :], "patch_tokens")
    return pa.table(columns, schema=schema)
