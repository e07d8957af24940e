"""The files that TensorBoard's projector reads: features, labels and small pictures of some hundred images.

Two sets are kept, those of the first evaluation and of the newest, so that a page shows what was learnt and a long run
leaves no more than a short one. SummaryWriter.add_embedding forgets, in a resumed run, what was there before, and keeps
all. No Ray here.
"""

import io
import math

import numpy as np
from google.protobuf import text_format
from numpy.typing import NDArray
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig

from pipeline.sink import Embedding
from pipeline.storage import Directory, MissingObject

CONFIG = "projector_config.pbtxt"
"""The name that TensorBoard looks for beside event files."""
_TITLE = "teacher, step "


def write_projector(folder: Directory, step: int, embedding: Embedding) -> None:
    """Add a set to those in the folder of the event files; it takes the place of those of its step and later."""
    earlier = [info for info in _read(folder).embeddings if _step(info) < step]
    kept = earlier[:1]
    place = "projector_newest" if kept else "projector_first"
    info = EmbeddingInfo(tensor_name=f"{_TITLE}{step}", tensor_path=f"{place}/tensors.tsv")
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
    # Last, so that what it names is there.
    config = ProjectorConfig(embeddings=[*kept, info])
    folder.write(CONFIG, text_format.MessageToString(config).encode())


def _step(info: EmbeddingInfo) -> int:
    return int(info.tensor_name.removeprefix(_TITLE))


def _read(folder: Directory) -> ProjectorConfig:
    try:
        return text_format.Parse(folder.read(CONFIG).decode(), ProjectorConfig())
    except MissingObject:
        return ProjectorConfig()


def _sprite(thumbnails: NDArray[np.uint8]) -> bytes:
    """[n, S, S, 3] row by row in the smallest square that holds them, as PNG."""
    n, height, width, _ = thumbnails.shape
    side = math.ceil(math.sqrt(n))
    cells = np.zeros((side * side, height, width, 3), np.uint8)
    cells[:n] = thumbnails
    sheet = cells.reshape(side, side, height, width, 3).swapaxes(1, 2).reshape(side * height, side * width, 3)
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, "PNG")
    return png.getvalue()
