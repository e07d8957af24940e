"""Has actors write the missing parts of a table, and watches them: what the jobs that write tables share."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console

from dinoray.jobs.cli.main import start_ray
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.data.detection import AUTO
from dinoray.pipeline.data.manifest import DataConfig
from dinoray.pipeline.data.source import Source
from dinoray.pipeline.evaluation.actors import EmbedTask, Work, embed_on_actors
from dinoray.pipeline.storage.files import Directory

if TYPE_CHECKING:
    from dinoray.pipeline.training.checkpoint import FrozenBackbone

_NOT_IN_ROWS = {"fetch_concurrency", "fetch_attempts", "row_group_cache_bytes", "max_bad_fraction"}
"""Settings of `data` that do not change what is written."""


def settings_of(data: DataConfig) -> dict[str, Any]:
    """Settings of `data`, by dotted key, that decide what is written; without those that are still to be detected."""
    plain = data.model_dump(mode="json", exclude=_NOT_IN_ROWS) | {"path": Directory(data.path).uri}
    return {f"data.{name}": value for name, value in plain.items() if value != AUTO}


def write_missing(
    work: Work,
    network: "FrozenBackbone | None",
    source: Source,
    *,
    missing: Sequence[int],
    num_parts: int,
    account: Callable[[Sequence[int]], int],
    limit: float,
    resources: ResourcesConfig,
    console: Console,
    verbose: bool,
) -> None:
    """Write the parts `missing` of `num_parts`: `work(backbone of the network or None, source, part)` gives a
    parts.Written.

    `account` reads what the given parts say, names the bad images among them and returns their number; DataError
    when there are more than `limit` of the source allows. It is asked at the start, and once they are too many.
    """
    done = sorted(set(range(num_parts)) - set(missing))
    num_bad = account(done)
    no_training = resources.model_copy(update={"train_workers": 1, "cpus_per_train_worker": 0})
    use_gpu, (_, actors) = start_ray(no_training, verbose=verbose)
    num_images, num_new = 0, 0
    started = shown = time.monotonic()
    try:
        task = EmbedTask(work, source, missing)
        for _, written in embed_on_actors(
            ray.put(network), [task], actors=actors, use_gpu=use_gpu, in_order=False
        ):
            done.append(written.part)
            num_new += 1
            num_images += written.num_rows + written.num_bad
            num_bad += written.num_bad
            if num_bad > limit * source.num_images:
                account(sorted(done))
            now = time.monotonic()
            if now - shown > 5 or num_new == len(missing):
                shown = now
                console.print(
                    f"{num_new}/{len(missing)} parts  {num_images} images  {num_bad} unreadable  "
                    f"{num_images / (now - started):.0f} images/s",
                    highlight=False,
                )
    finally:
        ray.shutdown()
