"""Two real gloo processes, without Ray: started once a session, and each test looks at what they found."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from paths import SUPPORT
from tiny import Batch, tiny_batch, tiny_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinoray.models.backbone import build_backbone
from dinoray.models.config import BackboneConfig
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import DataConfig, load_or_build
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig, ProbeConfig
from dinoray.pipeline.evaluation.features import Features, Shares, embed_sharded
from dinoray.pipeline.evaluation.in_training import Evaluation, evaluate
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

multiprocessing.set_forkserver_preload(["ranks", "pytest"])


def start_processes(function: Callable[..., None], **how: Any) -> Any:
    """Start processes as `torch.multiprocessing.spawn` does, but import torch once for all of them, in a process that
    forks them: to import it takes longer than their work, and a process that runs tests has threads, so it cannot be
    forked."""
    with pytest.MonkeyPatch.context() as patch:
        # That process looks for what it imports beforehand by its environment alone, and goes without what it misses.
        patch.setenv("PYTHONPATH", os.pathsep.join((str(SUPPORT), *sys.path)))
        forkserver.ensure_running()
    return torch.multiprocessing.start_processes(function, start_method="forkserver", **how)


WORLD_SIZE = 2
NUM_STEPS = 5
LABELS = ("dots", "rings", "stripes")
IMAGES_PER_LABEL = 3


class Rank(NamedTuple):
    """What one rank found."""

    metrics: list[dict[str, float]]
    centers: Tensor  # [steps, K]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    drop_path_logits: Tensor
    found: list[dict[str, Any]]
    counts: dict[str, int]
    trained: int
    features: Features
    evaluation: Evaluation | None


def training_config() -> DINOConfig:
    """Eight images a step, over all ranks together."""
    return tiny_config(
        optim={"warmup_epochs": 1, "freeze_last_layer_epochs": 0.4}, train={"global_batch_size": 8}
    )


def global_batch(config: DINOConfig, step: int) -> Batch:
    """The images of one step, over all ranks."""
    return tiny_batch(config, num_images=config.train.global_batch_size, seed=step)


def run_steps(state: TrainState, *, rows: slice) -> tuple[list[dict[str, float]], Tensor]:
    """Train on `rows` of each step's global batch; metrics and centre after each."""
    metrics, centers = [], []
    for step in range(NUM_STEPS):
        batch = {name: column[rows] for name, column in global_batch(state.config, step).items()}
        metrics.append({name: float(value) for name, value in train_step(state, batch).items()})
        centers.append(state.dino.center.clone())
    return metrics, torch.stack(centers)


def bad_batch(rank: int) -> Batch:
    """Three rows of which a rank found some bad: rank 0 position 0, rank 1 positions 3 and 5."""
    status = np.array([[1, 0, 0], [2, 0, 1]][rank], np.int8)
    note = [
        f'{{"key": "image {rank}-{row}", "reason": "told so"}}' if bad else ""
        for row, bad in enumerate(status)
    ]
    return {"position": np.arange(3) + 3 * rank, "status": status, "note": np.array(note, dtype=object)}


def labelled_source(folder: Path) -> Source:
    """A few small drawings in one folder per class."""
    for label in LABELS:
        (folder / label).mkdir(parents=True)
        for i in range(IMAGES_PER_LABEL):
            (folder / label / f"{i}.jpg").write_bytes(draw_demo_image(label, "val", i))
    config = DataConfig(path=str(folder), label_from_parent=True)
    return Source(config, load_or_build(config, Directory(str(folder.parent / f"{folder.name}-run"))))


def seeded_backbone() -> nn.Module:
    """A small ViT, the same on every call."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", kwargs=kwargs)
    return build_backbone(config, crop_sizes=(32,), drop_path_rate=0.0).eval()


def eval_config() -> EvalConfig:
    """Batches of two crops of 32 px."""
    return EvalConfig(batch_size=2, image_size=32, k=(1, 3))


@lru_cache(maxsize=1)
def two_ranks() -> list[Rank]:
    """Return what each of two processes found."""
    with tempfile.TemporaryDirectory() as folder:
        source = labelled_source(Path(folder) / "images")
        return on_two_ranks(_work, source)


def on_two_ranks(work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `work(rank, *args)` here as rank 0 and in a new process as rank 1; return both results.

    `work` is a module's function; its result is what `torch.save` takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        other = start_processes(_be_rank_one, args=(folder, work, args), join=False)
        first = _be_rank(0, folder, work, args)
        other.join()
        return [first, torch.load(Path(folder) / "rank_one.pt", weights_only=False)]


def _be_rank_one(_: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(_be_rank(1, folder, work, args), Path(folder) / "rank_one.pt")


def _be_rank(rank: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(minutes=3),
    )
    try:
        return work(rank, *args)
    finally:
        dist.destroy_process_group()


def _work(rank: int, source: Source) -> Rank:
    state = build_state(training_config(), num_images=40)
    state.student = distribute(state.dino, state.device)
    rows = state.config.train.global_batch_size // WORLD_SIZE
    metrics, centers = run_steps(state, rows=slice(rank * rows, (rank + 1) * rows))
    quarantine = Quarantine(first=100)
    quarantine.note(bad_batch(rank))
    found = quarantine.share(positions=106)
    features = embed_sharded(
        seeded_backbone(), source, state.config.crops, eval_config(), limit=1000, precision="fp32"
    )
    return Rank(
        metrics=metrics,
        centers=centers,
        student=state.dino.student.state_dict(),
        teacher=state.dino.teacher.state_dict(),
        drop_path_logits=_drop_path_logits(),
        found=found,
        counts=dict(quarantine.counts),
        trained=quarantine.trained,
        features=features,
        evaluation=evaluated(source),
    )


def evaluated(source: Source, *, shares: Shares | None = None) -> Evaluation | None:
    """What is measured of a small network on a few images."""
    return evaluate(
        seeded_backbone(),
        (source, source),
        source,
        [("grey", np.full((32, 32, 3), 128, np.uint8))],
        title="",
        algorithm=training_config(),
        config=eval_config().model_copy(update={"lidar": True}),
        probe=ProbeConfig(lidar_images=7, lidar_views=3),
        shares=shares,
    )


def _drop_path_logits() -> Tensor:
    """What the student answers, in the first step, to images that are the same on every rank."""
    config = tiny_config(backbone={"drop_path_rate": 0.5})
    state = build_state(config, num_images=40)
    state.student = DistributedDataParallel(state.dino.student)
    answers: list[Tensor] = []
    state.dino.student.head.register_forward_hook(lambda *call: answers.append(call[2].detach().clone()))
    train_step(state, tiny_batch(config))
    return answers[0]
