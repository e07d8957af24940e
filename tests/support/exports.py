"""Backbones, checkpoints and runs to export, and a Python process that knows nothing of dinoray to load them in."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import NUM_IMAGES, tiny_batch, tiny_config

from dinoray.pipeline.storage.run_dir import SNAPSHOT, checkpoint_name
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import FrozenBackbone, save_checkpoint
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

TINY_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
OWN_VIT: dict[str, Any] = {"patch_size": 4, **TINY_VIT}
TINY_SWIN: dict[str, Any] = {"window_size": 2, "depths": [1, 1, 1, 1], "embed_dim": 12}


def backbone(
    name: str, *, size: int = 32, local_size: int = 16, pos_embed: str = "timm", **kwargs: Any
) -> DINOConfig:
    """The tiny config with another backbone; replaces the tiny ViT's arguments."""
    config = tiny_config(crops={"global_crop_size": size, "local_crop_size": local_size})
    tree = config.model_dump()
    tree["backbone"] |= {"name": name, "kwargs": kwargs, "pos_embed": pos_embed}
    return DINOConfig.model_validate(tree)


def frozen_of(config: DINOConfig) -> FrozenBackbone:
    """A backbone of noise, position embeddings and batch statistics too, so that nothing is without effect."""
    torch.manual_seed(0)
    model = build_state(config, num_images=NUM_IMAGES).dino.teacher.backbone
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.ndim)):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return FrozenBackbone(config, {k: v.clone() for k, v in model.state_dict().items()})


def trained(config: DINOConfig, steps: int = 3) -> TrainState:
    state = build_state(config, num_images=NUM_IMAGES)
    for seed in range(steps):
        train_step(state, tiny_batch(config, seed=seed))
    return state


def checkpoint(state: TrainState, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(state, folder, num_images=NUM_IMAGES, quarantine=Quarantine())
    return folder


def run_directory(at: Path, state: TrainState, data_path: str = "/images") -> Path:
    """A run as training leaves it: config, metrics, one committed checkpoint."""
    name = checkpoint_name(state.step)
    checkpoint(state, at / "checkpoints" / name)
    (at / "checkpoints" / SNAPSHOT).write_text(
        json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name}]})
    )
    algorithm = state.config.model_dump(mode="json")
    data = {"path": data_path, **algorithm.pop("data")}
    config = {"recipe": "demo", "name": "run", "data": data, **algorithm}
    (at / "config.yaml").write_text(json.dumps(config))
    records = [
        {"step": 0, "knn_10": 0.25, "knn_20": 0.3, "majority": 0.1},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "knn_10": 0.5, "knn_20": 0.6, "majority": 0.1},
        {"step": 9, "knn_10": 0.9, "knn_20": 0.9, "majority": 0.1},
    ]
    (at / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 3, "kn')
    return at


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def run_elsewhere(code: str, folder: Path) -> str:
    """Run code in `folder` in a Python that finds none of our packages on its path; return what it prints."""
    ours = "assert 'dinoray' not in {name.partition('.')[0] for name in sys.modules}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{ours}"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
