"""The two sides of benchmarks/stream.py without Ray: the kernel on files in memory, and an actor's blocks."""

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import Crops, cut, decode_for, limit_threads, prepare_kernel
from dinoray.pipeline.augment.params import sample_image
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.jpeg import open_image
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.reading.source import Source


@dataclass(frozen=True)
class Work:
    """Images to crop, with settings; all three sides do the same work."""

    source: Source
    order: Order
    crops: CropsConfig


def kernel_alone(work: Work, positions: NDArray[np.int64], core: int) -> dict[str, Any]:
    """Return images/s of a core and CPU milliseconds per image for cropping files in memory."""
    pin([core])
    limit_threads()
    prepare_kernel(work.crops)
    epochs, images = work.order.locate(positions)
    unique, places = np.unique(images, return_inverse=True)
    files = work.source.fetch(unique.tolist())
    c, count = work.crops, 0
    out = Crops(
        np.empty((c.num_global_crops, c.global_crop_size, c.global_crop_size, 3), np.uint8),
        np.empty((c.num_local_crops, c.local_crop_size, c.local_crop_size, 3), np.uint8),
    )
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True):
        file = files[place]
        if file.data is None:
            continue
        try:
            image = open_image(file.data, max_pixels=work.source.config.max_pixels)
            params = sample_image(0, epoch, file.key, image.width, image.height, c)
            cut(decode_for(params, image), params, out)
        except BadImage:
            continue
        count += 1
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return {"images": count, "images_per_second": count / seconds, "cpu_ms": 1000 * cpu_seconds / count}


def blocks_alone(work: Work, blocks: list[NDArray[np.int64]], cores: list[int]) -> dict[str, Any]:
    """Return the same for an actor's code, including fetching, on as many threads as cores."""
    pin(cores)
    augmenter = Augmenter(work.source, work.order, work.crops, seed=0, num_threads=len(cores))
    augmenter.block(blocks[0])  # each thread has its own caches
    begin, cpu_begin = time.perf_counter(), time.process_time()
    count = sum(len(augmenter.block(positions)["position"]) for positions in blocks)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return {"images": count, "images_per_second": count / seconds, "cpu_ms": 1000 * cpu_seconds / count}


def pin(cores: list[int]) -> None:
    """Pin this thread and its future threads to these cores, if the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def available_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
