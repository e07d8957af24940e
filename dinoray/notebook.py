"""What a notebook uses of dinoray: start a run, read its metrics, load its teacher, embed images."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import timm
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.runs.choosing import Asked, as_begun
from dinoray.jobs.runs.holding import lease_of
from dinoray.jobs.runs.open_checkpoint import Opened, Step, open_network
from dinoray.jobs.runs.pretraining import pretrain as run_pretraining
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.config import DataConfig, PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.export.timm_export import CONFIG_FILE, WEIGHTS_FILE, export_timm
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import read_records


def pretrain(*overrides: str, recipe: str | None = None, config: str | Path | None = None) -> str:
    """Run or resume a pretraining to its end and return the address of its run directory.

    `overrides` are settings as on the command line, e.g. "data.path=photos"; `config` is a YAML file of settings.
    Raises ConfigError (a ValueError), DataError or ResourceError with a one-line remedy.
    """
    asked = Asked(recipe, None if config is None else Path(config), list(overrides))
    settings = asked.config()
    run = Directory(settings.storage_path).child(settings.name)
    if run.exists(run_dir.CONFIG):
        settings = as_begun(settings, asked, run)
    run_pretraining(settings, lease_of(run), verbose=False, asked=asked)
    return run.uri


def read_metrics(run: str | Path) -> pd.DataFrame:
    """Return the metrics that a run has logged so far: one row per step, by step, one column per metric.

    What was not logged at a step is NaN. Raises DataError if the folder holds no metrics.
    """
    rows: dict[int, dict[str, object]] = {}
    for line in read_records(Directory(str(run))).lines:
        rows.setdefault(line["step"], {}).update(line)
    if not rows:
        file = Directory(str(run)).join(run_dir.METRICS)
        raise DataError(f"{file} holds no metrics; give the directory that a run printed")
    return pd.DataFrame(list(rows.values())).set_index("step").sort_index()


def load_teacher(
    run: str | Path, *, step: Step | None = None, which: Literal["teacher", "student"] = "teacher"
) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """Load the backbone of a run (its newest checkpoint, that at `step`, or "best") or of a checkpoint's own folder.

    Returns a timm model in eval mode, float32 [n, 3, H, W] -> [n, D], and its transform, RGB image -> float32
    [3, H, W], which does what the run's evaluations do. Raises DataError or ConfigError if there is none.
    """
    return _teacher(open_network(str(run), step, which))


def _teacher(opened: Opened) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    around = opened.found.run
    image_size = None
    if around is not None and around.exists(run_dir.CONFIG):
        image_size = load_run_config(around).eval.image_size
    exported = export_timm(opened.network, image_size=image_size)
    with tempfile.TemporaryDirectory(prefix="dinoray-teacher-") as folder:
        (Path(folder) / CONFIG_FILE).write_bytes(exported.config)
        (Path(folder) / WEIGHTS_FILE).write_bytes(exported.weights)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(model)
    return model, timm.data.create_transform(**settings, is_training=False)


def embed(
    run: str | Path, files: Sequence[str | Path], *, step: Step | None = None, batch_size: int = 32
) -> NDArray[np.float32]:
    """Return the teacher's features of image files, local or s3://, as float32 [len(files), D].

    On a GPU if there is one. `dinoray embed` is for many images. Raises DataError for a file that cannot be read.
    """
    opened = open_network(str(run), step, "teacher")
    model, transform = _teacher(opened)
    pixels = opened.network.config.data
    if pixels.channels != 3:
        raise ConfigError(
            f"{run} takes pictures of data.channels={pixels.channels}, and this function RGB; use `dinoray embed`"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    width: Any = model.num_features
    features = []
    with torch.inference_mode():
        for start in range(0, len(files), batch_size):
            images = [transform(_read_image(str(file), pixels)) for file in files[start : start + batch_size]]
            features.append(model(torch.stack(images).to(device)).float().cpu().numpy())
    return np.concatenate([np.zeros((0, width), np.float32), *features])


def _read_image(file: str, pixels: PixelsConfig) -> Image.Image:
    folder, name = os.path.split(file)
    max_pixels = DataConfig.model_fields["max_pixels"].default
    try:
        data = Directory(folder or ".").read(name)
        return Image.fromarray(decode(data, max_pixels=max_pixels, config=pixels))
    except BadImage as error:
        raise DataError(f"{file} cannot be decoded: {error.reason}; leave it out") from error
