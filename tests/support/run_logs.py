"""The log of a run that nobody trained: steps, pictures and embeddings to put into it, and its lines."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.run_log import MetricsLog
from dinoray.pipeline.tracking.sink import Embedding


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def log_of(folder: Path, *, first_step: int = 0, resume_position: int = 0) -> MetricsLog:
    return MetricsLog(
        Directory(str(folder)), num_images=20, first_step=first_step, resume_position=resume_position
    )


def log_steps(log: MetricsLog, first: int, last: int, *, loss: float) -> None:
    for step in range(first, last + 1):
        log.log(step, {"loss": loss})


def png_of(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = (255, 0, 0), (0, 0, 255)


def embedding(value: float, labels: tuple[str, ...] = ("cat", "a\tb\nc", "")) -> Embedding:
    """Three images of two features; thumbnails of 2 px in one shade each."""
    thumbnails = np.stack([np.full((2, 2, 3), shade, np.uint8) for shade in (10, 20, 30)])
    return Embedding(np.array([[value, 2], [3, 4], [5, 6]], np.float32), list(labels), thumbnails)
