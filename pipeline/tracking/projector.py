"""Write the files of TensorBoard's projector: features, labels and thumbnails of a few hundred images.

Two sets are kept, from the first and the newest evaluation. The projector opens the newest set, and a long
run has no more files than a short run. SummaryWriter.add_embedding would keep all sets, and lose earlier sets
on a resume. No Ray here.
"""

import io
import math

import numpy as np
from google.protobuf import text_format
from numpy.typing import NDArray
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig

from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.tracking.sink import Embedding

CONFIG = "projector_config.pbtxt"
"""The file name that TensorBoard reads beside event files."""
FOLDERS = ("projector_first", "projector_newest")
_FIRST, _NEWEST = "start: teacher, step ", "newest: teacher, step "
"""Titles of the sets, without the step. The projector opens the set whose title is first in the alphabet."""


def write_projector(folder: Directory, step: int, embedding: Embedding) -> None:
    """Add a set to the folder of the event files; it replaces the sets of its step and of later steps."""
    earlier = [info for info in _read(folder).embeddings if _step(info) < step]
    kept = sorted(earlier, key=_step)[:1]
    for one in kept:
        one.tensor_name = f"{_FIRST}{_step(one)}"  # files of an earlier version have another title
    place, title = (FOLDERS[1], _NEWEST) if kept else (FOLDERS[0], _FIRST)
    info = EmbeddingInfo(tensor_name=f"{title}{step}", tensor_path=f"{place}/tensors.tsv")
    text = io.StringIO()
    np.savetxt(text, embedding.features, fmt="%.5g", delimiter="\t")
    folder.write(info.tensor_path, text.getvalue().encode())
    if any(embedding.labels):
        info.metadata_path = f"{place}/metadata.tsv"
        lines = [" ".join(label.split()) or "-" for label in embedding.labels]
        folder.write(info.metadata_path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
    info.sprite.image_path = f"{place}/sprite.png"
    info.sprite.single_image_dim.extend([embedding.thumbnails.shape[2], embedding.thumbnails.shape[1]])
    folder.write(info.sprite.image_path, _sprite(embedding.thumbnails))
    # Written last, so that the files named in it exist.
    config = ProjectorConfig(embeddings=[info, *kept])
    folder.write(CONFIG, text_format.MessageToString(config).encode())


def _step(info: EmbeddingInfo) -> int:
    return int(info.tensor_name.rpartition(" ")[2])


def _read(folder: Directory) -> ProjectorConfig:
    try:
        return text_format.Parse(folder.read(CONFIG).decode(), ProjectorConfig())
    except MissingObject:
        return ProjectorConfig()


def _sprite(thumbnails: NDArray[np.uint8]) -> bytes:
    """Return a PNG of the thumbnails [n, S, S, 3], row by row in the smallest square grid that holds them."""
    n, height, width, _ = thumbnails.shape
    side = math.ceil(math.sqrt(n))
    cells = np.zeros((side * side, height, width, 3), np.uint8)
    cells[:n] = thumbnails
    sheet = cells.reshape(side, side, height, width, 3).swapaxes(1, 2).reshape(side * height, side * width, 3)
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, "PNG")
    return png.getvalue()
