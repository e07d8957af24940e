"""Images per second: the augmentation alone, and the Ray Data stream that carries its crops to train workers.

    python benchmarks/throughput.py [--recipe demo] [--rounds 5] [key=value ...]

Both sides crop the same positions with the same code, in turn, round by round (A B A B ...), so that the ratio
holds on a noisy machine. The stream's consumers only count rows: no training. Its figure is that of the second
half, after start-up. Prints a table for RESULTS.md.
"""

import argparse
import statistics
import time
from dataclasses import replace

import ray

from jobs.config import load_config
from jobs.entry import run_main, start_ray
from pipeline import dataset
from pipeline.board import Board
from pipeline.crops import crop_bytes, limit_threads
from pipeline.demo_images import demo_folder, write_demo_images
from pipeline.layout import Layout, batch_size_per_worker, steps_per_block
from pipeline.manifest import build_manifest
from pipeline.order import Order
from pipeline.source import Source


@ray.remote(num_cpus=1)
def crop_alone(plan: dataset.StreamPlan, layout: Layout) -> float:
    """Images per second of one augmentation process on the layout's blocks, nothing sent anywhere."""
    limit_threads()
    source = ray.get(plan.source)
    dataset.crop_rows(source, plan, layout.block(0))  # caches and imports are warm from here on
    begin = time.perf_counter()
    rows = sum(
        len(dataset.crop_rows(source, plan, layout.block(i))["position"]) for i in range(layout.num_blocks)
    )
    return rows / (time.perf_counter() - begin)


@ray.remote(num_cpus=0)
def consume(split: ray.data.DataIterator, layout: Layout, rank: int) -> tuple[float, float, int]:
    """Time of the middle batch and of the last, and the rows after the middle one.

    Blocks pile up while the consumers start; by the middle they have caught up and wait for the actor.
    """
    middle, middle_step, rows = 0.0, (layout.last_step - layout.first_step) // 2, 0
    for i, batch in enumerate(dataset.batches(split, layout, rank=rank, prefetch_batches=2)):
        if i > middle_step:
            rows += len(batch["position"])
        elif i == middle_step:
            middle = time.time()
    return middle, time.time(), rows


def stream(plan: dataset.StreamPlan, layout: Layout) -> float:
    """Images per second over all ranks, in the second half of the layout."""
    splits = dataset.open_splits(plan, layout)
    parts = ray.get([consume.remote(split, layout, rank) for rank, split in enumerate(splits)])
    return sum(p[2] for p in parts) / (max(p[1] for p in parts) - min(p[0] for p in parts))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8000, help="per round and side")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.recipe, None, arguments.overrides)
    if config.data.path.startswith(str(demo_folder())):
        write_demo_images(demo_folder())
    source = Source(config.data, build_manifest(config.data))
    per_worker = batch_size_per_worker(config.train.global_batch_size, config.resources.train_workers)
    layout = Layout(
        first_step=0,
        last_step=max(1, arguments.images // config.train.global_batch_size),
        world_size=config.resources.train_workers,
        batch_size_per_worker=per_worker,
        steps_per_block=steps_per_block(per_worker, crop_bytes(config.crops)),
    )
    start_ray(config.resources, verbose=False)
    plan = dataset.StreamPlan(
        source=ray.put(source),
        board=Board(),
        order=Order(source.num_images, seed=0, group_sizes=source.manifest.group_sizes),
        crops=config.crops,
        seed=0,
        augment_actors=(1, 1),
        cpus_per_augment_actor=1,
    )
    alone, streamed = [], []
    for i in range(arguments.rounds):
        first = i * layout.last_step
        shifted = replace(layout, first_step=first, last_step=first + layout.last_step)
        alone.append(ray.get(crop_alone.remote(plan, shifted)))
        streamed.append(stream(plan, shifted))
    ratios = [s / a for s, a in zip(streamed, alone, strict=True)]
    print(
        f"| recipe {config.recipe}, {crop_bytes(config.crops):,} B of crops an image | images/s, median | range |"
    )
    print("|---|---|---|")
    for name, values in (
        ("one augmentation process alone", alone),
        ("stream of one actor, no training", streamed),
    ):
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} |")
    print(f"| stream / alone | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")
    ray.shutdown()


if __name__ == "__main__":
    run_main(main)
