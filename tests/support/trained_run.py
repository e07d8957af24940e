"""A run directory of a run that was trained here without Ray: its checkpoints, its log, its images beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jobs_processes import TINY
from ranks import on_two_ranks
from tiny_run import write_images

from dinoray.jobs.cli.config import load_config
from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.data.manifests.manifest import load_or_build
from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.ray_private.train import snapshot_of
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import SNAPSHOT, checkpoint_name
from dinoray.pipeline.tracking.run_log import MetricsLog
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import save_checkpoint
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.distributed import set_up_device, world_size
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train

STEPS, EVERY = 8, 3
"""Steps of such a run, of 8 images each, and steps between its checkpoints."""


def trained_runs(
    folder: Path, settings: Mapping[str, Sequence[str]], *, ranks: int = 1, bad: str | None = None
) -> list[Path]:
    """Train a run of each name in this process, as one rank or as rank 0 of two; return the run directories.

    `bad`: the file of an image that cannot be decoded.
    """
    write_images(folder / "images", "train", labels=tuple(PATTERNS)[:3], per_label=8)
    if bad:
        (folder / "images" / bad).write_bytes(b"no image")
    threads = torch.get_num_threads()
    try:
        if ranks == 2:
            on_two_ranks(_train_all, folder, settings)
        else:
            _train_all(0, folder, settings)
    finally:
        torch.set_num_threads(threads)
    return [folder / name for name in settings]


def _train_all(rank: int, folder: Path, settings: Mapping[str, Sequence[str]]) -> None:
    for name, own in settings.items():
        _train(rank, folder, name, own)


def _train(rank: int, folder: Path, name: str, settings: Sequence[str]) -> None:
    images = [f"name={name}", f"data.path={folder}/images", f"train.epochs={STEPS * 8 / 24}"]
    images += [f"checkpoint.every_steps={EVERY}", f"resources.train_workers={world_size()}"]
    config = load_config("demo", None, [*TINY, *images, "optim.warmup_epochs=0", *settings])
    run, kept = (Directory(str(folder / one)) for one in (name, f"{name}{rank or ''}"))
    source = Source(config.data, load_or_build(config.data, kept))
    algorithm = config.algorithm()
    set_up_device(torch.device("cpu"))
    state = build_state(algorithm, num_images=source.num_images)
    state.student = distribute(state.dino, state.device)
    steps = range(state.schedule.total_steps)
    layout = lay_out(
        steps, world_size=world_size(), global_batch_size=8, image_bytes=crop_bytes(algorithm.crops)
    )
    seed = algorithm.train.seed
    augmenter = Augmenter(source, source.order(seed), algorithm.crops, seed=seed, num_threads=1)
    log = MetricsLog(run, num_images=source.num_images) if rank == 0 else None
    quarantine, committed = Quarantine(), []

    def on_step(batch: Mapping[str, Any], metrics: dict[str, Any], _: float) -> None:
        quarantine.note(batch)
        bad = quarantine.share(positions=8 * state.step)
        state.skips.settle()  # each step is logged
        if log is None:
            return
        log.add_bad_images(bad)
        facts = {"skipped_steps": float(state.skipped), "train_workers": float(world_size())}
        log.log(state.step, {k: float(v) for k, v in metrics.items()} | facts)
        if state.step % EVERY == 0:
            committed.append(checkpoint_name(state.step))
            checkpoint = folder / name / "checkpoints" / committed[-1]
            checkpoint.mkdir(parents=True)
            save_checkpoint(state, checkpoint, num_images=source.num_images, quarantine=quarantine)

    train(state, (augmenter.block(layout.positions(step, rank)) for step in steps), on_step=on_step)
    if log is not None:
        log.close()
        run.write("config.yaml", config.to_yaml().encode())
        run.write(f"checkpoints/{SNAPSHOT}", snapshot_of(committed))
