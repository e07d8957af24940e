"""A run directory with checkpoints of a small untrained network: all that a job which reads runs asks for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jobs_processes import TINY

from dinoray.jobs.cli.config import load_config
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.ray_private.train import snapshot_of
from dinoray.pipeline.storage.run_dir import SNAPSHOT, checkpoint_name
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import save_checkpoint
from dinoray.pipeline.training.state import build_state

STEP = 7
NAME = checkpoint_name(STEP)


def write_images(folder: Path, split: str, *, labels: tuple[str, ...], per_label: int) -> Path:
    """Small drawings, one folder per class."""
    for label in labels:
        (folder / label).mkdir(parents=True)
        for i in range(per_label):
            (folder / label / f"{i:02d}.jpg").write_bytes(draw_demo_image(label, split, i))
    return folder


def local_run(folder: Path, name: str, *, steps: int, checkpoint_every: int) -> list[str]:
    """Arguments of a run in `folder` with one train worker, on 24 images there, all of which each step takes."""
    images = write_images(folder / "images", "train", labels=tuple(PATTERNS)[:3], per_label=8)
    return [
        *TINY,
        f"name={name}",
        f"data.path={images}",
        f"eval.val_path={images}",
        f"storage_path={folder}",
        f"train.epochs={steps}",
        "train.global_batch_size=24",
        "resources.train_workers=1",
        "optim.warmup_epochs=0",
        "head.use_bn=false",
        f"checkpoint.every_steps={checkpoint_every}",
        "eval.every_steps=1000",
    ]


def write_run(folder: Path, *settings: str, steps: Sequence[int] = (STEP,)) -> Path:
    """`folder` as a run directory of the demo recipe, tiny, with `settings` and checkpoints of these steps.

    Student and teacher differ.
    """
    config = load_config("demo", None, [*TINY, "name=tiny", *settings])
    state = build_state(config.algorithm(), num_images=40)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network, scale in ((state.dino.student, 0.1), (state.dino.teacher, 0.05)):
            for parameter in network.backbone.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    names = [checkpoint_name(step) for step in steps]
    for state.step, name in zip(steps, names, strict=True):
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        save_checkpoint(state, checkpoint, num_images=40, quarantine=Quarantine())
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "checkpoints" / SNAPSHOT).write_bytes(snapshot_of(names))
    return folder
