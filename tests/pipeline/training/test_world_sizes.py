"""What is learnt does not depend on the number of train workers, nor on changes of it from checkpoint to checkpoint."""

import tempfile
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ranks import start_processes
from tiny import tiny_batch, tiny_config

from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step

MOST_WORKERS = 4
BATCH, NUM_IMAGES, STEPS = 16, 160, 20

COURSES = {
    "1 worker": ((1, STEPS),),
    "4 workers": ((4, STEPS),),
    "changing": ((1, 5), (2, 6), (4, 5), (1, 4)),
}
"""(train workers, steps) in turn."""


def config_of_all() -> DINOConfig:
    """At most 4 images at once: one worker divides its 16 into 4 microbatches, four workers do not divide theirs."""
    train = {"global_batch_size": BATCH, "max_batch_size_per_worker": 4, "epochs": STEPS * BATCH / NUM_IMAGES}
    return tiny_config(head={"use_bn": False}, train=train)


def train_leg(rank: int, workers: int, first: int, last: int, folder: Path) -> list[float]:
    """The loss of the steps from `first` to `last`, from the checkpoint of the former to that of the latter."""
    config = config_of_all()
    state = build_state(config, num_images=NUM_IMAGES, resumed=first > 0)
    if first:
        load_checkpoint(state, folder / f"step_{first}")
    state.student = distribute(state.dino, state.device)
    layout = lay_out(range(first, last), world_size=workers, global_batch_size=BATCH, image_bytes=1)
    losses = []
    for step in range(first, last):
        rows = layout.positions(step, rank) - step * BATCH
        batch = {
            name: column[rows] for name, column in tiny_batch(config, num_images=BATCH, seed=step).items()
        }
        losses.append(float(train_step(state, batch)["loss"]))
    if rank == 0:
        (folder / f"step_{last}").mkdir()
        save_checkpoint(state, folder / f"step_{last}", num_images=NUM_IMAGES, quarantine=Quarantine())
    return losses


def train_courses(rank: int, root: Path) -> None:
    """Train all courses in turn, as one of the most workers; one that is not needed in a leg waits."""
    torch.set_num_threads(1)
    together = dist.FileStore(str(root / "together"), MOST_WORKERS)
    found = {}
    for name, course in COURSES.items():
        folder = root / name
        folder.mkdir(exist_ok=True)
        found[name] = []
        for (workers, _), (first, last) in zip(
            course, pairwise([0, *accumulate(steps for _, steps in course)]), strict=True
        ):
            if rank < workers:
                init_method = f"file://{folder}/store-{first}"
                dist.init_process_group(
                    "gloo", init_method, timedelta(minutes=3), world_size=workers, rank=rank
                )
                found[name] += train_leg(rank, workers, first, last, folder)
                dist.destroy_process_group()
            together.set(f"{name} {last} {rank}", "ended")
            together.wait([f"{name} {last} {other}" for other in range(MOST_WORKERS)])
    if rank == 0:
        torch.save(found, root / "losses.pt")


def test_loss_curves_of_any_numbers_of_workers_agree() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(train_courses, args=(Path(folder),), nprocs=MOST_WORKERS)
        losses = {name: np.array(found) for name, found in torch.load(Path(folder, "losses.pt")).items()}
    alone = losses["1 worker"]
    assert len(alone) == STEPS
    assert np.ptp(alone) > 0.1, "it learns, so that a step left out or done twice would be seen"
    assert {
        name: float(np.abs(found - alone).max()) < 1e-4 for name, found in losses.items()
    } == dict.fromkeys(COURSES, True)
