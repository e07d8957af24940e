"""How fast a run's step is without its stream, and its stream without its step: two rates, and which one limits.

For `pretrain --synthetic` and `--no-train`. Nothing is trained or kept, and no run directory is touched.
"""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ray
import torch
from rich.console import Console

from dinoray.jobs.cli.main import is_local, start_ray
from dinoray.jobs.runs.run_files import draw_demo
from dinoray.models.commands import command
from dinoray.models.errors import ResourceError
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.lost_ray import leave_ray
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.partition import Layout, batch_size_per_worker, lay_out
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.planning.calibrate import Trained, measure_step
from dinoray.pipeline.stream import ray_data
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.config import DINOConfig, Schedule
from dinoray.pipeline.training.flops import Utilisation
from dinoray.pipeline.training.staging import staged
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.driver import check_run, stream_plan
from dinoray.pipeline.worker.inputs import Inputs

_SECONDS = 20.0
"""Of each measurement; the stream's begins with the first batch."""
_WARM_UP = 0.25
"""Share of it that does not count: the first blocks come all at once."""


def measure_head_space(config: Config, *, step: bool, stream: bool, verbose: bool) -> None:
    """Print the rate of the step alone, that of the stream alone, and, given both, the bottleneck.

    The step is measured in this process, or, in a job on a cluster, by a task on one of its GPU nodes.
    """
    check_run(config)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    draw_demo(config, console)
    images = Source(config.data, build_manifest(config.data, config.storage), config.storage)
    algorithm = resolve(config.algorithm(), num_images=images.num_images).config
    step_rate = stream_rate = None
    if step and is_local():
        step_rate = _step_alone(config, algorithm, console, images.num_images, on_gpu=_has_gpu(config))
    if stream or not is_local():
        use_gpu, (_, actors) = start_ray(config.resources, verbose=verbose, num_streams=config.data.streams)
        try:
            if step and step_rate is None:
                step_rate = _step_alone(config, algorithm, console, images.num_images, on_gpu=use_gpu)
            if stream:
                total_steps = Schedule(algorithm, num_images=images.num_images).total_steps
                stream_rate = _stream_alone(config, images, console, total_steps, actors, use_gpu=use_gpu)
        finally:
            leave_ray()
    if step_rate and stream_rate:
        console.print(describe_bottleneck(step_rate, stream_rate))


def _has_gpu(config: Config) -> bool:
    if config.resources.use_gpu is True and not torch.cuda.is_available():
        raise ResourceError(
            "resources.use_gpu=true, but this machine has no GPU to measure the step on; "
            f"set resources.use_gpu=false, or measure on a cluster: {command('submit')} -- ..."
        )
    return torch.cuda.is_available() and config.resources.use_gpu is not False


def describe_bottleneck(step_rate: float, stream_rate: float) -> str:
    """Return which of two rates in images/s limits a run, and what the other one would allow."""
    if stream_rate < step_rate:
        return (
            f"bottleneck: the stream; with free data it would be {step_rate:,.0f} images/s, "
            f"{step_rate / stream_rate:.2g} times as many"
        )
    return f"bottleneck: the training step; the stream could feed {stream_rate / step_rate:.2g} times as many images"


def _step_alone(
    config: Config, algorithm: DINOConfig, console: Console, num_images: int, *, on_gpu: bool
) -> float:
    """Print and return the rate over all train workers."""
    console.print(f"measuring the step for {_SECONDS:g} s")
    workers = config.resources.most_workers
    batch = batch_size_per_worker(config.train.global_batch_size, workers)
    options: dict[str, Any] = {"num_images": num_images, "batch_size": batch, "seconds": _SECONDS}
    if is_local():
        measured, used = _measure_step(algorithm, on_gpu=on_gpu, **options)
    else:
        task = ray.remote(num_cpus=1, num_gpus=int(on_gpu))(_measure_step)
        measured, used = ray.get(task.remote(algorithm, on_gpu=on_gpu, **options))
    each = measured.images_per_second
    devices = workers if on_gpu else os.cpu_count() or 1  # workers on CPUs divide those of the machine
    line = f"step alone: {each:,.0f} images/s on {measured.device} with {batch} images a step"
    if used:
        line += f", {used['tflops']:.0f} TFLOP/s, MFU {used['mfu']:.0%}"
    if devices > 1:
        kind, remark = ("GPUs", "without the exchange of gradients") if on_gpu else ("CPUs", "without crops")
        line += f"; {each * devices:,.0f} on {devices} {kind}, {remark}"
    console.print(line)
    return each * devices


def _measure_step(algorithm: DINOConfig, *, on_gpu: bool, **options: Any) -> tuple[Trained, dict[str, float]]:
    measured = measure_step(algorithm, on_gpu=on_gpu, **options)
    used = Utilisation.of_run(algorithm, torch.device("cuda" if on_gpu else "cpu"), num_devices=1)
    return measured, used.at(measured.images_per_second) if used else {}


def _stream_alone(
    config: Config, images: Source, console: Console, total_steps: int, actors: int, *, use_gpu: bool
) -> float:
    """Print and return the rate at which a train worker each takes the batches of its rank."""
    console.print(f"measuring the stream for {_SECONDS:g} s, with {actors} augment actors")
    # Not fewer actors at first: nobody trains who would ask for more.
    plan = stream_plan(
        config, Inputs(images, None), ray.put(images), RunChannel(), augment_actors=(actors, actors)
    )
    layout = lay_out(
        range(total_steps),
        world_size=config.resources.most_workers,
        global_batch_size=config.train.global_batch_size,
        image_bytes=crop_bytes(config.crops),
        block_bytes=plan.block_bytes,
    )
    leg = next(ray_data.legs(layout, plan.num_streams))
    splits = ray_data.open_splits(plan, leg)
    options: dict[str, Any] = {"num_cpus": config.resources.cpus_per_train_worker}
    consume = ray.remote(**options, num_gpus=int(use_gpu), max_retries=0)(_consume)
    ahead = config.resources.prefetch_batches
    found = [
        consume.remote(split, leg, rank, prefetch_batches=ahead, seconds=_SECONDS)
        for rank, split in enumerate(splits)
    ]
    rate = sum(taken.images / taken.seconds for taken in ray.get(found))
    console.print(f"stream alone: {rate:,.0f} images/s to {len(splits)} train workers")
    return rate


class Taken(NamedTuple):
    """What came out of a stream."""

    images: int
    seconds: float


def _consume(split: Any, leg: Layout, rank: int, *, prefetch_batches: int, seconds: float) -> Taken:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = ray_data.batches(split, leg, rank=rank, prefetch_batches=prefetch_batches)
    return take(staged(batches, device), seconds)


def take(batches: Iterable[Mapping[str, Any]], seconds: float) -> Taken:
    """Take batches for `seconds` from the first one on, or to the last one; count those after the warm-up.

    Of a stream that ends earlier all count, with the time to the last one.
    """
    first = now = None
    all_images = images = 0
    begin = 0.0
    for batch in batches:
        now = time.perf_counter()
        if first is None:
            first = begin = now
            continue  # its time was spent before it came
        all_images += len(batch["position"])
        if now - first < _WARM_UP * seconds:
            begin = now
            continue
        images += len(batch["position"])
        if now - first >= seconds:
            break
    if first is None or now is None or now == first:
        return Taken(0, 1.0)
    return Taken(images, now - begin) if images else Taken(all_images, now - first)
