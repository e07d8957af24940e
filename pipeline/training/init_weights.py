"""Load a new run's initial weights from a published checkpoint, another program's file, or an earlier run.

Reads a file or run into the form of models/published/checkpoint.py, and loads it into a run's state. No Ray
here.
"""

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load as load_safetensors

from dinoray.models.config import timm_name
from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.models.lora import merged, without_adapters
from dinoray.models.optim import restore_optimizer
from dinoray.models.published import checkpoint as interop
from dinoray.models.published.checkpoint import Loaded, Weights
from dinoray.models.published.optimizer import why_fresh
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, normal_uri
from dinoray.pipeline.storage.run_dir import committed_checkpoints
from dinoray.pipeline.training.checkpoint import download_checkpoint, find_checkpoint, read_parts
from dinoray.pipeline.training.published_weights import timm_weights
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.state_copy import FROZEN_PART

_NOT_WEIGHTS = re.compile(r"(?i)\.(onnx|onnx\.data|json|ya?ml|np[yz]|h5|msgpack|parquet|pb|tflite|engine)$")
"""Suffixes of files that hold no weights, or weights of another kind of program."""


_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
"""File names that timm and transformers give to the weights in a model's folder."""
_CONFIG = "config.json"
_OF_OPTIMIZER = ("name", "layer_decay", "patch_embed_lr_scale")
"""Settings that decide what an optimizer's state holds."""
_SHARD = re.compile(r"^(model|pytorch_model)-\d+-of-\d+\.")
INIT_LINE = "init: "
"""Prefix of each line about a run's initial weights, in the output and in its environment.json."""


def read_weights(path: str) -> Weights:
    """Read the weights at `path`: timm:NAME, a file, a dinoray run (its newest checkpoint) or a checkpoint."""
    if timm_name(path) is not None:
        return timm_weights(path)
    uri = normal_uri(path)
    folder, _, name = uri.rpartition("/")
    here = Directory(folder or "/")
    if not here.exists(name):
        return _read_folder(path, Directory(uri))
    if _NOT_WEIGHTS.search(uri):
        raise ConfigError(
            f"init.from={path} is not a file of weights that training can start from; pass the .pth or .safetensors "
            "file that it was made from, a run directory or a checkpoint folder"
        )
    state, may_be_official = _read_state(here, name)  # the file's bytes are freed before names are converted
    weights = interop.parse(state, uri)
    weights = weights._replace(official=weights.official and may_be_official)
    return weights._replace(args=weights.args | _heads_beside(here, weights))


def _read_state(folder: Directory, name: str) -> tuple[Mapping[str, Any], bool]:
    """Return a file's contents, and False if its position embeddings were not resized as published.

    timm's names equal the published names. In a safetensors file, dinoray's mark shows published resizing.
    """
    data, uri = folder.read(name), folder.join(name)
    if not _is_safetensors(data):
        return interop.read_state(data, uri), True
    try:
        state = load_safetensors(data)
    except Exception as error:  # a damaged file may raise anything
        raise DataError(
            f"{uri} is not a safetensors file: {one_line(error)}; save or download it anew"
        ) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if FROZEN_PART in header:
        raise ConfigError(
            f"init.from={uri} lacks the part of the network that did not train, which lies in {header[FROZEN_PART]} "
            f"beside it; pass the checkpoint's folder, {folder.uri}"
        )
    return state, header.get(interop.POS_EMBED_KEY) == "official"


def _heads_beside(folder: Directory, weights: Weights) -> dict[str, int]:
    """Return `num_heads` from the config.json that transformers saves beside its weights, if it is there."""
    is_theirs = str(weights.args.get("program", "")).startswith("transformers")
    if not is_theirs or not folder.exists(_CONFIG):
        return {}
    try:
        heads = json.loads(folder.read(_CONFIG)).get("num_attention_heads")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{folder.join(_CONFIG)} is not the config of a transformers model: {one_line(error)}; save or download "
            "it anew, or remove it"
        ) from error
    return {"num_heads": heads} if isinstance(heads, int) else {}


def load_initial_weights(
    state: TrainState, weights: Weights, load: Literal["backbone", "weights", "run"]
) -> list[str]:
    """Load `weights` into a state at step 0; return lines on the loaded, skipped and new parts.

    Raises ConfigError if the weights do not fit.
    """
    kwargs = state.config.backbone.kwargs
    if load != "run" or weights.args.get("train") != state.config.backbone.train:
        weights = _with_merged_adapters(weights)
    loaded = interop.load(state.dino, weights, backbone_only=load == "backbone", kwargs=kwargs)
    lines = _network_lines(state, weights, loaded)
    notes = [*weights.notes, *loaded.notes]
    new = [part for part, is_there in (("head", loaded.head), ("centre", loaded.center)) if not is_there]
    skipped = [*weights.skipped]
    if weights.has_head and not loaded.head:
        skipped.append("head")
    if weights.center is not None and not loaded.center:
        skipped.append(weights.places[2] or "centre")
    if load == "run":
        line, fresh = _continue_from(state, weights)
        lines.append(line)
        if fresh == sum(len(group["params"]) for group in state.optimizer.param_groups):
            new.append("optimizer state")
            skipped.append("optimizer")
        elif fresh:
            new.append(f"optimizer state of {fresh} parameters")
    else:
        new.append("optimizer state")
        skipped += [
            k for k, v in (("optimizer", weights.optimizer), ("epoch", weights.epoch)) if v is not None
        ]
    lines.append(f"skipped: {_listed(skipped)}")
    lines.append(f"new: {_listed(new)}")
    return lines + notes


def _with_merged_adapters(weights: Weights) -> Weights:
    """Return the weights of a run with adapters as those of one without; of other files the same."""
    teacher = merged(weights.teacher)
    student = teacher if weights.student is weights.teacher else merged(weights.student)
    return weights._replace(student=student, teacher=teacher)


def _network_lines(state: TrainState, weights: Weights, loaded: Loaded) -> list[str]:
    """Return lines with the part of the file that each network was loaded from."""
    student, teacher, center = (
        f"'{place}' of {weights.name}" if place else weights.name for place in weights.places
    )
    num_tensors = len(without_adapters(state.dino.teacher.backbone.state_dict()))
    parts = f"backbone ({num_tensors} tensors)"
    if loaded.head:
        parts += f", head ({len(state.dino.teacher.head.state_dict())} tensors)"
    lines = [f"student from {student}: {parts}", f"teacher from {teacher}: {parts}"]
    if weights.student is weights.teacher:
        lines = [f"student and teacher from {teacher}: {parts}"]
    return lines + ([f"centre from {center}"] if loaded.center else [])


def _continue_from(state: TrainState, weights: Weights) -> tuple[str, int]:
    """Restore optimizer and step; return a line about them, and the number of parameters left fresh."""
    if weights.optimizer is None or weights.epoch is None:
        raise ConfigError(
            f"init.load=run needs optimizer and epoch, which {weights.name} lacks; set init.load=weights"
        )
    state.step = math.floor(state.schedule.steps(weights.epoch) + 1e-6)
    if state.step >= state.schedule.total_steps:
        raise ConfigError(
            f"train.epochs={state.config.train.epochs:g} is not more than the {weights.epoch:g} epochs that "
            f"{weights.name} has behind it; set train.epochs={math.floor(weights.epoch) + 1} or more, or "
            "init.load=weights"
        )
    optim, then, why = state.config.optim, weights.args, ""
    if not weights.is_own:
        student = state.dino.student
        restored, fresh = interop.load_optimizer(state.optimizer, student, weights.optimizer, weights.student)
        if fresh:
            why = why_fresh(state.optimizer, student, weights.optimizer, weights.name)
    else:
        now = {f"optim.{key}": getattr(optim, key) for key in _OF_OPTIMIZER}
        now["backbone.train"] = state.config.backbone.train
        changed = {key: then[key.partition(".")[2]] for key in now}
        changed = {key: value for key, value in changed.items() if value != now[key]}
        if changed:
            why = ", ".join(f"{key}={now[key]} is {value} there" for key, value in changed.items())
            why += f"; set {' '.join(f'{key}={value}' for key, value in changed.items())} to restore it"
        else:
            restore_optimizer(state.optimizer, weights.optimizer)
        restored = len(state.optimizer.state)
        fresh = sum(len(group["params"]) for group in state.optimizer.param_groups) - restored
    values = [
        v for saved in state.optimizer.state.values() for v in saved.values() if isinstance(v, torch.Tensor)
    ]
    if not all(bool(torch.isfinite(v).all()) for v in values):
        raise DataError(
            f"{weights.name} has NaN or infinite values in the optimizer's state; set init.load=weights"
        )
    at, because = f"at epoch {weights.epoch:g}, step {state.step}", f", because {why}" if why else ""
    if not restored:
        what, with_ = f"optimizer state: none of {fresh} parameters restored", " with fresh moments"
    else:
        what, with_ = f"optimizer state of {restored} of {restored + fresh} parameters", ""
    return f"{what}{because}; training continues{with_} {at}", fresh


def _listed(parts: Sequence[str]) -> str:
    """Join the first parts, each shortened, because a file may hold thousands."""
    shown = [one_line(ValueError(part), limit=60) for part in dict.fromkeys(parts)]
    return (", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")) or "nothing"


def _is_safetensors(data: bytes) -> bool:
    """Return True if the bytes begin like a safetensors file: the length of a header, and a JSON header."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _read_folder(path: str, folder: Directory) -> Weights:
    """Read the weights of a run, of a checkpoint, or of another library's model folder."""
    names = folder.list()
    if not names and Path(folder.uri).is_dir():
        raise DataError(f"init.from={path} is an empty folder; pass a file of weights, or a run directory")
    if not names:
        raise DataError(f"init.from={path}: there is no such file or folder; check the path")
    if run_dir.META in names or run_dir.CHECKPOINTS in names:
        return _read_run(folder.uri)
    for name in _MODEL_FILES:
        if name in names:
            return read_weights(folder.join(name))
    if any(name.endswith(".distcp") for name in names):
        raise ConfigError(
            f"init.from={path} is a sharded checkpoint of torch.distributed, as DINOv3 writes while it trains; "
            "pass weights.pth, which this writes: python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {path} weights.pth"
        )
    if shards := [name for name in names if _SHARD.search(name)]:
        raise ConfigError(
            f"init.from={path} has its weights in {len(shards)} files; save the model anew as one, with "
            "save_pretrained(FOLDER, max_shard_size='1TB'), and pass FOLDER"
        )
    files = [name for name in names if name.lower().endswith(_FILE_SUFFIXES)]
    remedy = f"pass one of its files, such as {folder.join(files[0])}" if files else "pass a file of weights"
    raise ConfigError(
        f"init.from={path} is a folder but no dinoray run or checkpoint; {remedy}, or a run directory"
    )


def _read_run(address: str) -> Weights:
    """Read the weights of a run's newest checkpoint, or of a checkpoint."""
    here = Directory(address)
    if not here.exists(run_dir.META) and not committed_checkpoints(here):
        raise DataError(
            f"init.from={address} is a run that has no checkpoint yet; wait for its first, or pass another run"
        )
    with tempfile.TemporaryDirectory(prefix="dinoray-init-") as scratch:
        found = find_checkpoint(address)
        folder = download_checkpoint(found.folder, Path(scratch))
        parts = read_parts(folder, address=found.folder.uri)
        meta, state, config = parts.meta, parts.train_state, parts.meta["config"]
        backbone = {"name": config["backbone"]["name"].split(".")[0], "kwargs": config["backbone"]["kwargs"]}
        return Weights(
            student=parts.whole_student,
            teacher=parts.teacher,
            center=state["center"],
            optimizer=state["optimizer"],
            epoch=meta["positions"] / meta["num_images"],
            # Earlier versions had a scale of 1.
            args={key: config["optim"].get(key, 1.0) for key in _OF_OPTIMIZER}
            | {"train": config["backbone"].get("train", "all"), "backbone": backbone},
            official=config["backbone"]["pos_embed"] == "official",
            name=found.folder.uri,
            places=("student", "teacher", "center"),
            is_own=True,
        )
