"""A frozen network from the address of a run or of a checkpoint, and settings for one that has no run around it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from dinoray.jobs.cli.config import apply_overrides, validate
from dinoray.models.errors import ConfigError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_checkpoints, step_of
from dinoray.pipeline.tracking.records import read_records
from dinoray.pipeline.tracking.scores import best_checkpoint
from dinoray.pipeline.training.checkpoint import (
    Found,
    FrozenBackbone,
    Which,
    download_checkpoint,
    find_checkpoint,
    network_files,
    read_frozen,
    read_meta,
)
from dinoray.pipeline.worker.config import Config

Step: TypeAlias = int | Literal["best", "last"]


class Opened(NamedTuple):
    """A checkpoint's network in memory: where it was found, its backbone, and the step that it was taken at."""

    found: Found
    network: FrozenBackbone
    step: int


def number_of(step: Step | None, address: str) -> int | None:
    """Return `step` as a number, for `best` that of the best checkpoint of the run at `address`; None: the newest."""
    if step != "best":
        return None if step == "last" else step
    run = Directory(address)
    best = best_checkpoint(run, read_records(run))
    if best is None:
        raise ConfigError(
            f"--step best: no checkpoint of {run.uri} has a score, because none of their steps was evaluated; "
            "leave --step out for the newest"
        )
    return best.step


def best_or_newest(address: str) -> tuple[int | None, str]:
    """Return the step of the best checkpoint of a run, and a line on it; (None, line) where none was evaluated.

    A checkpoint's own folder is the only one there: (None, "").
    """
    here = Directory(address)
    if here.exists(run_dir.META):
        return None, ""
    names = committed_checkpoints(here)
    best = best_checkpoint(here, read_records(here)) if names else None
    if best is None:
        return None, f"the newest checkpoint, {names[-1]}: none has a score" if names else ""
    newest = step_of(names[-1])
    other = (
        "which is the newest too" if best.step == newest else f"not the newest, step {newest} (--step last)"
    )
    return best.step, f"the best checkpoint: {best}; {other}"


def open_network(address: str, step: Step | None, which: Which) -> Opened:
    """Read one network of a run's checkpoint (at `step`, else the newest) or of a checkpoint's own folder."""
    step = number_of(step, address)
    found = find_checkpoint(address, step)
    with tempfile.TemporaryDirectory(prefix="dinoray-network-") as scratch:
        address = found.folder.uri
        folder = download_checkpoint(found.folder, Path(scratch), (run_dir.META,))
        files = network_files(read_meta(folder, address=address), which)
        download_checkpoint(found.folder, folder, files)
        network = read_frozen(folder, which, address=address)
        opened = Opened(found, network, read_meta(folder, address=address)["step"])
    if step is not None and step != opened.step:
        raise ConfigError(
            f"--step {step}, but {found.folder.uri} is {checkpoint_name(opened.step)}; "
            "leave --step out, or give the run directory"
        )
    return opened


def standalone_config(
    network: FrozenBackbone, sections: Mapping[str, Any], overrides: Sequence[str]
) -> Config:
    """Settings around a network whose run is not known: what it was trained with, `sections`, `overrides`."""
    algorithm = network.config.model_dump(mode="json")
    sections = {**sections, "data": {**algorithm["data"], **sections.get("data", {})}}
    return validate(apply_overrides({**algorithm, "name": "lone", "recipe": "demo", **sections}, overrides))
