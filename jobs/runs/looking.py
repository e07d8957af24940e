"""What the recipe auto is told: number, size, channels and classes of the images, and the devices that there are.

Reads a listing and a sample of the images. Joins a cluster for as long as it takes to count its GPUs and CPUs; on one
machine Ray does not start.
"""

from collections.abc import Callable

import ray

from dinoray.jobs.cli.auto_facts import Facts
from dinoray.jobs.cli.main import is_local, join_ray
from dinoray.jobs.runs.data_contents import facts_on_images, read_sample
from dinoray.jobs.runs.run_size import available_cores
from dinoray.pipeline.cluster.lost_ray import leave_ray
from dinoray.pipeline.data.listing.bounds import Bound
from dinoray.pipeline.data.manifests.manifest import Manifest, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.worker.config import Config


def look(config: Config, manifest: Manifest, *, num_images: int | None = None) -> Facts:
    """Return the facts on the images of a manifest and on the devices.

    `num_images`: where the manifest is of a part of the images, about how many there are. Raises DataError if no image
    can be read because of the storage, ResourceError if a cluster cannot be joined.
    """
    source = Source(config.data, manifest, config.storage)
    sample, _ = read_sample(source)
    gpus, gpu_bytes, cpus = _devices()
    facts = facts_on_images(source, sample, num_images=num_images or source.num_images)
    return facts._replace(gpus=gpus, gpu_bytes=gpu_bytes, cpus=cpus)


def look_briefly(config: Config, *, bound: Callable[[], Bound] = Bound) -> Facts:
    """As `look`, of what can be listed in some seconds; nothing is written."""
    limits = bound()
    manifest = build_manifest(config.data, config.storage, bound=limits)
    return look(config, manifest, num_images=round(manifest.num_images / limits.share_of_files))


def _devices() -> tuple[int, int, int]:
    """Return GPUs, the memory of one in bytes (0: not known), and CPU cores."""
    if is_local():
        import torch  # takes seconds, which commands need not wait for that choose nothing

        gpus = torch.cuda.device_count()
        memory = [torch.cuda.get_device_properties(i).total_memory for i in range(gpus)]
        return gpus, min(memory, default=0), available_cores()
    join_ray(1, verbose=False)
    try:
        have = ray.cluster_resources()
    finally:
        leave_ray()
    return int(have.get("GPU", 0)), 0, max(1, int(have.get("CPU", 1)))
