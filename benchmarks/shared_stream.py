"""What sharing a stream saves: several consumers of one shared stream, against as many streams of their own.

    python benchmarks/shared_stream.py [--consumers 4] [--images 8192] [--rounds 3] [--unique 200] [--batch 32]
                                       [--recipe R] [--json FILE] [key=value ...]

All consumers take the same images in the same crops, as the trials of a study do. In turns, round by round:

    separate   each consumer has a plan of its own (pipeline/stream/ray_data.py) with one actor
    shared     all have one shared stream (pipeline/stream/shared_stream.py) with an actor for each core

The figure is the CPU time of all processes of the Ray session, of the actors and of all together, for each image that
a consumer received; it holds on a busy machine too. What is measured lies between two moments at which all consumers
are under way: each has received its first blocks and none its last ones, more at either end than can be under way. No
start-up is in it. Consumers do nothing but touch what arrives, so that they wait and queues are empty.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from augment_tables import machine
from stream import draw, edge_turns, session_cpu, touch
from stream_alone import available_cores
from stream_tables import markdown

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main, start_ray
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.stream import ray_data, shared_stream

SIDES = ("separate", "shared")
_SAMPLE_SECONDS = 0.25

Open = Callable[[], Iterator[dict[str, Any]]]


@ray.remote(num_cpus=0)
class Consumer:
    """A consumer as an actor, so that all consumers can be up before the first begins."""

    def is_up(self) -> bool:
        return True

    def consume(self, open_batches: Open) -> list[float]:
        """Return the arrival time of each batch."""
        times = []
        batches = open_batches()
        for batch in batches:
            times.append(time.time())
            touch(batch)
            del batch  # a view pins its block
        return times


def cpu_by_role(driver: int) -> dict[str, float]:
    """Return CPU seconds of the session so far, without the driver, which only runs this query."""
    found: dict[str, float] = {}
    for role, seconds in session_cpu(driver).values():
        if role != "driver":
            found[role] = found.get(role, 0.0) + seconds
    return found


def run(opens: Sequence[Open], *, edge: int, batch: int) -> dict[str, float]:
    """Run all consumers at once; return images/s of each, and CPU milliseconds per image and consumer."""
    consumers = [Consumer.remote() for _ in opens]
    ray.get([consumer.is_up.remote() for consumer in consumers])
    started = [
        consumer.consume.remote(open_batches) for consumer, open_batches in zip(consumers, opens, strict=True)
    ]
    pending, samples = started, []
    while pending:
        samples.append((time.time(), cpu_by_role(os.getpid())))
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=_SAMPLE_SECONDS)
    arrivals = ray.get(started)
    first, last = max(times[edge] for times in arrivals), min(times[-edge] for times in arrivals)
    within = [sample for sample in samples if first <= sample[0] <= last]
    if len(within) < 3:
        spans = ", ".join(f"{times[-1] - times[0]:.1f}" for times in arrivals)
        raise ConfigError(
            f"consumers took {spans} s and were all under way for {last - first:.1f} s; take more --images"
        )
    (begin, before), (end, after) = within[0], within[-1]
    images = batch * sum(begin < moment <= end for times in arrivals for moment in times)
    return {
        "images_per_second": images / len(arrivals) / (end - begin),
        "actors_ms": 1000 * (after["actor"] - before["actor"]) / images,
        "all_ms": 1000 * (sum(after.values()) - sum(before.values())) / images,
        "images": images,
    }


def separate(plans: Sequence[ray_data.StreamPlan], layout: Layout) -> dict[str, float]:
    """Run each consumer with its own plan."""
    opens = []
    for plan in plans:
        (split,) = ray_data.open_splits(plan, layout)
        opens.append(partial(ray_data.batches, split, layout, rank=0, prefetch_batches=2))
    return run(opens, edge=edge_turns(1, layout), batch=layout.batch_size_per_worker)


def shared(plan: ray_data.StreamPlan, consumers: int, actors: int, layout: Layout) -> dict[str, float]:
    """Run all consumers on one stream, whose window holds the largest lag: twice all blocks in progress."""
    edge = edge_turns(actors, layout)
    window = 2 * edge * layout.batch_size_per_worker * crop_bytes(plan.crops)
    stream = shared_stream.SharedStream(plan, num_actors=actors, window_bytes=window)
    one = partial(shared_stream.batches, stream, layout, rank=0, prefetch_batches=2)
    return {
        **run(consumers * [one], edge=edge, batch=layout.batch_size_per_worker),
        **stream.stats()._asdict(),
    }


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """Return a table of medians over the rounds, their range, and the saving factor of the shared stream."""

    def cell(values: Sequence[float], digits: int) -> str:
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    names = ("actors_ms", "all_ms", "images_per_second")
    rows = [
        [side, *(cell([r[name] for r in measured[side]], 1 if name == names[2] else 2) for name in names)]
        for side in SIDES
    ]
    pairs = list(zip(measured["separate"], measured["shared"], strict=True))
    ratios = [cell([own[name] / common[name] for own, common in pairs], 2) for name in names[:2]]
    rows.append(
        [
            "separate / shared",
            *ratios,
            f"1 / {cell([common[names[2]] / own[names[2]] for own, common in pairs], 2)}",
        ]
    )
    head = ["per image of a consumer", "actors, CPU ms", "all processes, CPU ms", "images/s of each consumer"]
    return markdown(head, rows)


def main(argv: list[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vit_small_imagenet_vanilla", help="whose crops are made")
    parser.add_argument("--consumers", type=int, default=4)
    parser.add_argument("--images", type=int, default=8192, help="of each consumer in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unique", type=int, default=200, help="how many images are drawn")
    parser.add_argument("--batch", type=int, default=32, help="images of a step, and of a block")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    cores, steps = len(available_cores()), arguments.images // arguments.batch
    layouts = [
        Layout(
            first_step=i * steps,
            last_step=(i + 1) * steps,
            world_size=1,
            batch_size_per_worker=arguments.batch,
            steps_per_block=1,
        )
        for i in range(arguments.rounds)
    ]
    least = 2 * edge_turns(cores, layouts[0]) + 2
    if steps < least:
        raise ConfigError(
            f"--images={arguments.images} are {steps} blocks, {least} are needed: "
            f"take --images={least * arguments.batch}"
        )
    with tempfile.TemporaryDirectory(prefix="dinoray-stream-") as folder:
        config = load_config(arguments.recipe, None, [*arguments.overrides, f"data.path={folder}"])
        draw(Path(folder), arguments.unique, "folder")
        source = Source(config.data, build_manifest(config.data))
        actors = max(cores, arguments.consumers)
        start_ray(
            config.resources.model_copy(update={"augment_actors": 2 * actors, "use_gpu": False}),
            verbose=False,
        )
        plan = ray_data.StreamPlan(
            source=ray.put(source),
            channel=RunChannel(),
            order=Order(source.num_images, seed=0),
            crops=config.crops,
            seed=0,
            augment_actors=(1, 1),
            cpus_per_augment_actor=1,
            cool_down_seconds=60,
        )
        measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for i, layout in enumerate(layouts):
            measured["separate"].append(separate(arguments.consumers * [plan], layout))
            measured["shared"].append(shared(plan, arguments.consumers, cores, layout))
            print(f"measured round {i + 1}: {measured['shared'][-1]}", file=sys.stderr, flush=True)
        ray.shutdown()
    made, given = (sum(r[name] for r in measured["shared"]) for name in ("blocks_made", "blocks_given"))
    print(f"{arguments.consumers} consumers, {arguments.images} images of 0.2 megapixels each in each round;")
    print(f"blocks made for the shared stream: {made:.0f}, given: {given:.0f}\n")
    print(table(measured))
    if arguments.json:
        report = {"rounds": measured, "machine": machine(), "load": os.getloadavg()}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
