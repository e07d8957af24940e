"""The state that a replay begins from: a checkpoint before the step, or the weights that the run began with."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dinoray.jobs.cli.config import apply_overrides, load_run_config, validate_as
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.manifest import Manifest, build_manifest
from dinoray.pipeline.data.reading.measuring import kept_measurement
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.checkpoint_files import DamagedCheckpointError
from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3
from dinoray.pipeline.storage.run_dir import committed_checkpoints, step_of
from dinoray.pipeline.study.trials import TRIALS
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.checkpoint import CheckpointParts, download_checkpoint, load_parts, read_parts
from dinoray.pipeline.training.init_weights import load_initial_weights, read_weights
from dinoray.pipeline.training.match_weights import adapt
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.worker.config import Config

INITIAL = "initial"
"""Stands for the weights that a run began with, where the name of a checkpoint is given."""


class Start(NamedTuple):
    """A restored state, the settings that it was restored with, the checkpoint's name, and what was refused."""

    state: TrainState
    config: Config
    name: str
    refused: Sequence[str]


class StartOptions(NamedTuple):
    """Which state is asked for."""

    step: int
    """The step to replay, counted from 1."""
    checkpoint: str | None
    overrides: Sequence[str]
    device: torch.device


def read_manifest(run: Directory, config: Config) -> Manifest:
    """Return the images of the run, or of the study that it is a trial of. Raises DataError if there is no list."""
    here = _where(run, run_dir.MANIFEST)
    try:
        return Manifest.from_bytes(here.read(run_dir.MANIFEST), config.data)
    except MissingObject as error:
        if config.data.manifest is not None:
            return build_manifest(config.data, config.storage)
        raise DataError(
            f"{here.uri} has no {run_dir.MANIFEST}, so which images a step had is not known; restore it from a copy"
        ) from error


def _where(run: Directory, name: str) -> Directory:
    """Return the run that has a file, or the study that it is a trial of."""
    study = run.uri.rpartition(f"/{TRIALS}/")[0]
    return run if run.exists(name) or not study else Directory(study)


def open_start(run: Directory, options: StartOptions, *, num_images: int) -> Start:
    """Restore the newest checkpoint before the step that is whole and finite, or the one that is asked for.

    Without one, begin as the run did, unless it passed checkpoints that are gone. Raises ConfigError for a checkpoint
    that is not before the step, and DataError if none is left.
    """
    names, asked = committed_checkpoints(run), options.checkpoint
    before = [name for name in reversed(names) if step_of(name) < options.step]
    if asked not in (None, INITIAL, *before):
        raise ConfigError(
            f"--checkpoint {asked} is not a checkpoint of {run.uri} before step {options.step}; choose one of "
            f"{', '.join([*reversed(before), INITIAL])}"
        )
    refused: list[str] = []
    for name in before if asked is None else [asked] if asked != INITIAL else []:
        try:
            parts = _read(run, name, options.device)
            why = parts.non_finite() if asked is None else None
        except DamagedCheckpointError as error:
            if asked is not None:
                raise
            why = error.what
        if why is None:
            return _restore(run, name, parts, options, refused)
        refused.append(f"checkpoint {name} is refused: {why}")
    kept = load_run_config(run, options.overrides)
    if asked is None and (refused or options.step > kept.checkpoint.every_steps):
        why = "".join(f"; {one}" for one in refused)
        later = f"pass --step {step_of(names[0]) + 1} or a later one, or " if names and not refused else ""
        raise DataError(
            f"no checkpoint of {run.uri} before step {options.step} is left{why}; {later}pass --checkpoint "
            f"{INITIAL} to repeat all {options.step} steps from the weights that the run began with"
        )
    state = begin(run, kept, options.device, num_images=num_images)
    return Start(state, kept.with_pixels_of(state.config), INITIAL, refused)


def _read(run: Directory, name: str, device: torch.device) -> CheckpointParts:
    checkpoint = run.child(run_dir.CHECKPOINTS).child(name)
    if not is_s3(checkpoint.uri):
        return read_parts(Path(checkpoint.uri), device=device)
    with tempfile.TemporaryDirectory(prefix="dinoray-replay-") as scratch:
        folder = download_checkpoint(checkpoint, Path(scratch))
        return read_parts(folder, device=device, address=checkpoint.uri)


def _restore(
    run: Directory, name: str, parts: CheckpointParts, options: StartOptions, refused: Sequence[str]
) -> Start:
    """Build the networks that the checkpoint is of, with the overrides, and load it."""
    tree, learnt = load_run_config(run).model_dump(mode="json"), parts.meta["config"]
    tree |= learnt | {
        "data": {**tree["data"], **learnt.get("data", {"value_range": None})},
        "init": {**tree["init"], **learnt.get("init", {})},
    }
    config = validate_as(Config, apply_overrides(tree, options.overrides), defaults=tree)
    state = build_state(
        config.algorithm(),
        num_images=parts.meta["num_images"],
        device=options.device,
        health=config.health,
        resumed=True,
    )
    load_parts(state, parts, run.join(run_dir.CHECKPOINTS, name))
    return Start(state, config, name, refused)


def begin(run: Directory, config: Config, device: torch.device, *, num_images: int) -> TrainState:
    """Build the networks and load the weights that the run, of these settings, began with."""
    measured = kept_measurement(_where(run, run_dir.PIXELS))
    algorithm = resolve(config.algorithm(), num_images=num_images, measured=measured).config
    weights = None if config.init.path is None else read_weights(config.init.path)
    if weights is not None:
        algorithm = adapt(algorithm, weights)
    state = build_state(algorithm, num_images=num_images, device=device, health=config.health)
    if weights is not None:
        load_initial_weights(state, weights, config.init.load)
    return state
