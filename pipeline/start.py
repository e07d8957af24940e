"""Where a new run's weights come from: nothing, a published checkpoint, any backbone, or an earlier run.

Reads a file or run into the one form that models/interop.py knows, and starts a run's state from it. No Ray here.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file

from models import interop
from models.interop import Weights
from models.optim import restore_optimizer
from models.settings import ConfigError, DataError, Settings, one_line
from pipeline.checkpoint import download_checkpoint, find_checkpoint, read_meta
from pipeline.storage import Directory, normal_uri
from pipeline.training import TrainState

_FILE_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")


class InitConfig(Settings):
    """What the networks start from."""

    path: str | None = Field(default=None, min_length=1)
    """A .pth or .safetensors file, local or s3://, or a dinoray run or checkpoint; None starts from noise."""
    load: Literal["backbone", "weights", "run"] = "weights"
    """The backbone alone; all weights and the centre; or all of the run: optimiser and epoch as well."""

    @field_validator("path")
    @classmethod
    def _path_is_an_address(cls, path: str | None) -> str | None:
        if path is not None:
            normal_uri(path)
        return path


def read_weights(path: str) -> Weights:
    """The weights of a file, as its name tells, or of a dinoray run (its newest checkpoint) or checkpoint."""
    uri = normal_uri(path)
    if not uri.endswith(_FILE_SUFFIXES):
        return _read_run(uri)
    folder, _, name = uri.rpartition("/")
    data = Directory(folder or "/").read(name)
    if not name.endswith(".safetensors"):
        return interop.read_weights(data, uri)
    try:
        state = load_safetensors(data)
    except Exception as error:  # a damaged file may raise anything
        raise DataError(f"{uri} is no safetensors file: {one_line(error)}") from error
    # timm's names and the published ones are alike: only a mark of ours tells how positions were resized.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    mark = header.get("__metadata__", {}).get(interop.MARK, "timm")
    weights = interop.parse(state, uri)
    return weights._replace(official=weights.official and mark == "official")


def start_from(state: TrainState, weights: Weights, load: Literal["backbone", "weights", "run"]) -> list[str]:
    """Put `weights` into a state at step 0; return notes on what started fresh. ConfigError where they do not fit."""
    notes = interop.load(state.dino, weights, backbone_only=load == "backbone")
    if load != "run":
        return notes
    if weights.optimizer is None or weights.epoch is None:
        raise ConfigError(
            "init.load=run needs a checkpoint with optimiser and epoch, this one has weights alone; "
            "set init.load=weights"
        )
    state.step = math.floor(state.schedule.steps(weights.epoch) + 1e-6)
    if state.step >= state.schedule.total_steps:
        raise ConfigError(
            f"train.epochs={state.config.train.epochs:g} must be more than the {weights.epoch:g} epochs that the "
            "checkpoint has behind it with init.load=run; raise it, or set init.load=weights"
        )
    if "layer_decay" not in weights.args:  # a published one, in the published order
        restored, fresh = interop.load_optimizer(state.optimizer, state.dino.student, weights.optimizer)
        if fresh:
            notes.append(f"the optimiser's state starts fresh for {fresh} of {restored + fresh} parameters")
    elif weights.args["layer_decay"] == state.config.optim.layer_decay:
        restore_optimizer(state.optimizer, weights.optimizer)
    else:
        notes.append("the optimiser's state starts fresh, because optim.layer_decay differs")
    return [*notes, f"continues at epoch {weights.epoch:g}, step {state.step}"]


def _read_run(address: str) -> Weights:
    with tempfile.TemporaryDirectory(prefix="dinoray-init-") as scratch:
        folder = download_checkpoint(find_checkpoint(address).folder, Path(scratch))
        meta = read_meta(folder)
        state = torch.load(folder / "train_state.pt", weights_only=True, map_location="cpu")
        config = meta["config"]
        return Weights(
            student=load_file(folder / "student.safetensors"),
            teacher=load_file(folder / "teacher.safetensors"),
            center=state["center"],
            optimizer=state["optimizer"],
            epoch=meta["positions"] / meta["num_images"],
            args={"layer_decay": config["optim"]["layer_decay"], "optimizer": config["optim"]["name"]},
            official=config["backbone"]["pos_embed"] == "official",
        )
