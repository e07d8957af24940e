"""Short measurements for a plan: crops per CPU, latency of a request, training rate of a device. No Ray.

CPUs are measured by the CPU time of this process, so neither slow storage nor other programs count. Crops are
made on all CPUs at once, because a virtual CPU is slower beside a busy one. A GPU is measured by wall-clock
time.
"""

import os
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dinoray.pipeline.augment.augmenter import STAGES, Augmenter
from dinoray.pipeline.augment.config import CropsConfig, crop_shapes
from dinoray.pipeline.augment.multicrop import limit_threads, prepare_kernel
from dinoray.pipeline.augment.params import photometric_columns, sample
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.training.config import DINOConfig, FreezeConfig
from dinoray.pipeline.training.distributed import set_up_device
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

_BLOCK_IMAGES = 64
_REQUESTS = 24
_LEAST_STEPS = 3


class Cropped(NamedTuple):
    """Measured cost of fetching, decoding and cropping; `cpu_ms` is CPU milliseconds per image, by stage."""

    images_per_second_per_cpu: float
    cpu_ms: dict[str, float]
    images: int
    threads: int


class Trained(NamedTuple):
    """Measured training rate of one device; on CPUs, the rate of one CPU."""

    images_per_second: float
    device: str
    steps: int


def measure_crops(
    source: Source, order: Order, crops: CropsConfig, *, seed: int, seconds: float, threads: int | None = None
) -> Cropped:
    """Crop images of the run's first epoch for some seconds on `threads` threads; the default is all CPUs.

    Sets up the whole process like an augment actor. Raises the same errors as `Augmenter.block`.
    """
    limit_threads()
    prepare_kernel(crops)
    threads = threads or os.cpu_count() or 1
    augmenter = Augmenter(source, order, crops, seed=seed, num_threads=threads)
    blocks = _blocks(source.num_images)
    augmenter.block(next(blocks)[: 2 * threads])  # opens connections, compiles what is not cached
    images, stages = 0, np.zeros(len(STAGES))
    end, cpu_seconds = time.monotonic() + seconds, -time.process_time()
    while not images or time.monotonic() < end:
        columns = augmenter.block(next(blocks))
        images += len(columns["position"])
        stages += columns["cpu_ms"].sum(axis=0)
    cpu_seconds += time.process_time()
    cpu_ms = dict(zip(STAGES, (stages / images).tolist(), strict=True))
    return Cropped(images / cpu_seconds, cpu_ms, images, threads)


def _blocks(num_images: int) -> Iterator[NDArray[np.int64]]:
    """Yield positions of the stream, one block at a time, repeating the first epoch."""
    size, first = min(_BLOCK_IMAGES, num_images), 0
    while True:
        yield np.arange(first, first + size)
        first = first + size if first + 2 * size <= num_images else 0


def measure_latency(source: Source) -> float:
    """Return the latency of one image in milliseconds: the median of a few sequential requests."""
    spaced = np.linspace(0, source.num_images - 1, min(_REQUESTS, source.num_images)).astype(int)
    took = []
    for index in spaced.tolist():
        begin = time.perf_counter()
        source.fetch([index])
        took.append(time.perf_counter() - begin)
    return 1000 * statistics.median(took[1:] or took)  # the first request also connects


def measure_step(
    config: DINOConfig, *, num_images: int, batch_size: int, seconds: float, on_gpu: bool
) -> Trained:
    """Train for some seconds on noise shaped like crops, `batch_size` images per step, on one GPU or CPU.

    The noise lies on the device, as a run's batches do by the time of their step (training/staging.py).
    The time to exchange gradients between GPUs is not included. Raises the same errors as `train_step`.
    """
    device = torch.device("cuda" if on_gpu else "cpu")
    set_up_device(device)
    # Threads of one step wait for one another by spinning, which CPU time would include.
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    shapes = zip(("global_crops", "local_crops"), crop_shapes(config.crops), strict=True)
    columns: dict[str, NDArray[Any]] = {
        name: rng.integers(0, 256, (batch_size, *shape), dtype=np.uint8) for name, shape in shapes
    }
    if config.crops.photometric == "device":
        drawn = [sample(rng, 500, 375, config.crops).split_photometric()[1] for _ in range(batch_size)]
        columns |= photometric_columns(np.stack(drawn), config.crops)
    batch = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
    state = build_state(_all_learns(config), num_images=num_images, device=device, resumed=True)
    state.compile()
    times = _step_times(state, batch, seconds)
    name = f"one {torch.cuda.get_device_name(device)}" if on_gpu else "one CPU"
    if state.compilation.note:
        name += f" ({state.compilation.note})"
    return Trained(batch_size / statistics.median(times), name, len(times))


def _step_times(state: TrainState, batch: dict[str, torch.Tensor], seconds: float) -> list[float]:
    """Return the times of the steps after the first two: wall-clock seconds on a GPU, CPU seconds on CPUs."""
    on_gpu = state.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time

    def step() -> float:
        begin = clock()
        train_step(state, batch)
        if on_gpu:
            torch.cuda.synchronize(state.device)
        return clock() - begin

    for _ in range(2):
        step()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < _LEAST_STEPS or time.monotonic() < end:
        times.append(step())
    return times


def _all_learns(config: DINOConfig) -> DINOConfig:
    """Return the settings without a frozen stage, whose steps are fewer and take less."""
    return config.model_copy(update={"init": FreezeConfig()})


def gradient_bytes(config: DINOConfig, *, num_images: int) -> int:
    """Return the bytes of one step's gradients, which GPUs on different nodes exchange."""
    student = build_state(_all_learns(config), num_images=num_images, resumed=True).dino.student
    return sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
