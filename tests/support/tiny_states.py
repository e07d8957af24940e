"""Networks of the smallest run, fresh or after some steps, what they have learnt, and checkpoints of them."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny import NUM_IMAGES, tiny_batch, tiny_config
from torch import Tensor

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import SNAPSHOT
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import save_checkpoint
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

METRICS = {
    "loss",
    "teacher_entropy",
    "kl",
    "grad_norm",
    "lr",
    "weight_decay",
    "teacher_momentum",
    "teacher_temp",
}


def tiny_state(config: DINOConfig | None = None) -> TrainState:
    return build_state(config or tiny_config(), num_images=NUM_IMAGES)


def weights(state: TrainState) -> dict[str, Tensor]:
    """Everything learnt: student, teacher, centre."""
    return {name: x.clone() for name, x in state.dino.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def after(steps: int, **changes: dict[str, Any]) -> TrainState:
    """A run after some steps on the same images."""
    config = tiny_config(**changes)
    state = build_state(config, num_images=NUM_IMAGES)
    for seed in range(steps):
        train_step(state, tiny_batch(config, seed=seed))
    return state


def save(state: TrainState, folder: Path, **bad_images: int) -> Path:
    """A checkpoint of `state` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine()
    quarantine.counts.update(bad_images)
    save_checkpoint(state, folder, num_images=NUM_IMAGES, quarantine=quarantine)
    return folder


def commit(run: Directory, *names: str) -> None:
    """What Ray Train has committed, in its own form but for what is not read."""
    results = [{"checkpoint_dir_name": name, "metrics": {"step": 1}} for name in names]
    run.write(f"checkpoints/{SNAPSHOT}", json.dumps({"checkpoint_results": results}).encode())


def flip(file: Path, *, place: float = 0.5) -> None:
    """Change one bit of a file at `place`, from 0 to 1."""
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)
