"""Embeddings of a data set as Parquet parts: the content of a part, and how to write it.

A directory of embeddings, local or on S3, follows parquet_parts.py:

    part-00000.parquet        key, vector, label?, patch_tokens?; row r of the manifest is in part r // rows_per_file
    _about/embed.json         settings that decide the vectors; a command with other settings is refused

No Ray here.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from dinoray.models.backbone import embed_dim
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.decoding.decode import eval_crop
from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.backbone_outputs import has_tokens, with_patches
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.export.config import Dtype, Precision
from dinoray.pipeline.export.parquet_parts import PartFormat, PartResult, PartWriter
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.checkpoint import FrozenBackbone

KIND = PartFormat(
    settings="_about/embed.json",
    manifest="_about/manifest.parquet",
    metadata=b"dinoray.embeddings",
    rows="vectors",
    written="embedded",
    rows_out="vectors_out",
)

_AIM_BYTES, _MOST_BYTES = 64 << 20, 1 << 30


@dataclass(frozen=True)
class Plan:
    """All settings that decide the content of the parts, beside the images.

    `weights` identifies the network.
    """

    weights: str
    embed_dim: int
    num_patches: int
    """Patch tokens per image; 0 stores none."""
    image_size: int
    dtype: Dtype
    precision: Precision
    batch_size: int
    rows_per_file: int
    with_labels: bool

    def num_parts(self, num_images: int) -> int:
        """Return the number of parts for the images of a manifest."""
        return -(-num_images // self.rows_per_file)

    def rows(self, part: int, num_images: int) -> range:
        """Return the manifest's rows that belong to a part."""
        return range(part * self.rows_per_file, min((part + 1) * self.rows_per_file, num_images))

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings recorded in the note of each part."""
        return {"weights": self.weights}

    def schema(self) -> pa.Schema:
        """Return the columns of every part."""
        number = pa.float16() if self.dtype == "float16" else pa.float32()
        fields = {"key": pa.string(), "vector": pa.list_(number, self.embed_dim)}
        if self.with_labels:
            fields["label"] = pa.string()
        if self.num_patches:
            fields["patch_tokens"] = pa.list_(number, self.num_patches * self.embed_dim)
        return pa.schema(fields)


def weights_digest(network: FrozenBackbone) -> str:
    """Return the identity of a network's function: a digest of its weights, architecture and pixel scale."""
    crops = network.config.crops
    architecture = network.config.backbone.model_dump(mode="json"), crops.pixel_mean, crops.pixel_std
    digest = hashlib.blake2b(json.dumps(architecture, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(network.weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure(network: FrozenBackbone, image_size: int, *, patch_tokens: bool) -> tuple[int, int]:
    """Return (embed_dim, number of patch tokens to store) at this size.

    Raises ConfigError without patch tokens.
    """
    backbone = network.backbone()
    width = embed_dim(backbone)
    if not patch_tokens:
        return width, 0
    if not has_tokens(backbone):
        raise ConfigError(
            f"--patch-tokens: {network.config.backbone.name} is not a vision transformer; leave the option out"
        )
    picture = torch.zeros(1, network.config.crops.channels, image_size, image_size)
    with torch.no_grad():
        return width, with_patches(backbone, picture).shape[1] // width - 1


def choose_rows_per_file(asked: int | None, *, row_bytes: int, num_images: int) -> int:
    """Return `asked` if its parts are bounded, else about 64 parts of 256 to 10,000 rows, at most 64 MiB."""
    if asked is None:
        most = max(1, min(10_000, _AIM_BYTES // row_bytes))
        return min(most, max(256, -(-num_images // 64)))
    if asked * row_bytes > _MOST_BYTES:
        raise ConfigError(
            f"--rows-per-file {asked} makes parts of {asked * row_bytes >> 20} MiB, which are held in memory; "
            f"set at most {_MOST_BYTES // row_bytes}, which fit 1 GiB"
        )
    return asked


def write_part(
    backbone: nn.Module, source: Source, part: int, *, out: Directory, crops: CropsConfig, plan: Plan
) -> PartResult:
    """Embed the images of one part and write it, in one step.

    Raises DataError if storage denies access, or if the vectors are not finite in the requested dtype.
    """
    rows = plan.rows(part, source.num_images)
    writer = PartWriter(KIND, part, rows, plan.schema())
    keys: list[str] = []
    labels: list[str | None] = []
    vectors: list[NDArray[np.floating]] = []
    position = rows.start
    for batch in load_batches(
        source, rows, lambda image, _: eval_crop(image, size=plan.image_size), batch_size=plan.batch_size
    ):
        pixels = []
        for image in batch:
            if image.pixels is None:
                writer.quarantine(position, image.key, image.status, image.reason)
            else:
                keys.append(image.key)
                labels.append(image.label)
                pixels.append(image.pixels)
            position += 1
        if pixels:
            vectors.append(_vectors(backbone, np.stack(pixels), keys[-len(pixels) :], crops, plan))
    writer.write(_table(keys, labels, vectors, plan))
    return writer.commit(out, _facts(plan), compression="zstd", use_dictionary=False)


def _facts(plan: Plan) -> dict[str, Any]:
    """Return facts for readers of one part: patch_tokens is a row of num_patches * embed_dim numbers."""
    facts = asdict(plan)
    return {k: facts[k] for k in ("weights", "embed_dim", "num_patches", "image_size", "precision")}


def _vectors(
    backbone: nn.Module, images: NDArray[np.uint8], keys: Sequence[str], crops: CropsConfig, plan: Plan
) -> NDArray[np.floating]:
    """Return [n, (1 + num_patches) * embed_dim] in the requested dtype, finite."""
    forward = with_patches if plan.num_patches else None
    with np.errstate(over="ignore"):
        rows = embed(backbone, images, crops, precision=plan.precision, forward=forward).astype(plan.dtype)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DataError(
            f"the vector of {keys[int(finite.argmin())]} is not finite as {plan.dtype}; "
            f"{'pass --dtype float32' if plan.dtype == 'float16' else 'the checkpoint is damaged: choose another'}"
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
