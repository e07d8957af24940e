"""What Ray costs: the stream that feeds train workers, against the same code on the same images without Ray.

    python benchmarks/stream.py [--pools 1x1 1x2 2x1] [--consumers 1 2] [--images 20000] [--rounds 2]
                                [--layout folder|parquet] [--unique 500] [--path DATA] [--batch 64]
                                [--block-images N] [--recipe R] [--json FILE] [--stats] [key=value ...]

A pool is actors x threads. For each pool and number of consumers three things take turns, round by round:

    kernel   header, parameters, decoding and crops of files in memory, in a process pinned to one core
    block    the augmenter's blocks, which fetch too, in that process on as many cores as an actor has threads
    stream   pipeline/stream/ray_data.py's stream of these blocks to consumers that do nothing but touch what arrives

The stream crops every position of its round, the other two every k-th of them. "By the clock" is the stream's images/s
over the kernel's, times actors x threads. An actor also uses cores that no thread of its crops on (it fetches, and
copies one block to the object store while it makes the next), so the honest figure is that by CPU: the kernel's CPU
time per image over that of all processes of the Ray session together. It also holds on a busy machine.

Queued blocks cannot flatter the stream. Consumers are faster than actors, so they wait and queues are empty (the share
of time that they waited stands in the table). What is measured begins when a block comes to a consumer and ends when a
later one does, both far enough from the ends of the stream that as many blocks are under way at one as at the other;
then what was consumed between the two was also made between them. No start-up is in it.

Images are drawn (benchmarks/augment_images.py), as files or as Parquet in row groups of 4 MiB of which few are cached,
unless --path names any `data.path`. Prints tables for RESULTS.md.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import augment_images
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import stream_tables as tables
from augment_tables import machine
from stream_alone import Work, available_cores, blocks_alone, kernel_alone

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main, start_ray
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.pipeline.augment.augmenter import STAGES
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.partition import Layout, steps_per_block
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.stream import ray_data
from dinoray.pipeline.worker.config import Config

MOST_ALONE = 4096
"""Maximum images per round for the kernel and the blocks, whose files are all in memory."""
_DRAWN = ["data.row_group_cache_bytes=16777216"]  # data sets are larger than the cache: few hits


def session_cpu(driver: int) -> dict[int, tuple[str, float]]:
    """Return process id -> (role, CPU seconds so far) for the driver and its descendants: the Ray session."""
    found = {}
    root = psutil.Process(driver)
    for process in [root, *root.children(recursive=True)]:
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        role = "driver" if process.pid == driver else tables.role_of(title)
        if role is not None:
            found[process.pid] = role, times.user + times.system
    return found


def touch(batch: dict[str, Any]) -> None:
    """Read one byte of each page of the crops, which maps the page in this process."""
    for name in ("global_crops", "local_crops"):
        batch[name].reshape(-1)[::4096].max(initial=0)


@ray.remote(num_cpus=0)
def consume(
    split: ray.data.DataIterator, layout: Layout, rank: int, edge: int, driver: int
) -> dict[str, Any]:
    """Return a rank's totals from its `edge`-th block to its `edge`-th last; rank 0 adds session data."""
    turns = layout.num_blocks // layout.world_size
    rows, rows_in_all, waited = 0, 0, 0.0
    begin = end = 0.0
    stages = np.zeros(len(STAGES))
    before: dict[int, tuple[str, float]] = {}
    after: dict[int, tuple[str, float]] = {}
    batches = ray_data.batches(split, layout, rank=rank, prefetch_batches=2)
    for i in range(layout.last_step - layout.first_step):
        asked = time.perf_counter()
        batch = next(batches)
        now = time.perf_counter()
        turn, step = divmod(i, layout.steps_per_block)
        if step == 0 and turn == turns - 1 - edge:
            end, after = now, session_cpu(driver) if rank == 0 else {}
        if begin and not end:
            waited += now - asked
        if step == 0 and turn == edge:
            begin, before = now, session_cpu(driver) if rank == 0 else {}
        if begin and not end:
            rows += len(batch["position"])
            stages += batch["cpu_ms"].sum(axis=0)
        rows_in_all += len(batch["position"])
        touch(batch)
        del batch  # a view pins its block
    next(batches, None)  # checks that the stream has ended
    seconds = end - begin
    cpu: dict[str, float] = {}
    for process, (role, cpu_seconds) in after.items():
        cpu[role] = cpu.get(role, 0.0) + cpu_seconds - before.get(process, ("", 0.0))[1]
    return {
        "rows": rows,
        "rows_in_all": rows_in_all,
        "seconds": seconds,
        "waited": waited / seconds,
        "stages": stages,
        "cpu": cpu,
        "stats": split.stats() if rank == 0 else "",
    }


def stream(plan: ray_data.StreamPlan, layout: Layout) -> dict[str, Any]:
    """Return images/s over all ranks, CPU ms per image by process and stage, and Ray Data's statistics."""
    splits = ray_data.open_splits(plan, layout)
    edge = edge_turns(plan.augment_actors[0], layout)
    me = os.getpid()
    parts = ray.get([consume.remote(split, layout, rank, edge, me) for rank, split in enumerate(splits)])
    images_per_second = sum(part["rows"] / part["seconds"] for part in parts)
    images = images_per_second * parts[0]["seconds"]  # of all ranks, in the time of rank 0
    by_process = {role: 1000 * seconds / images for role, seconds in parts[0]["cpu"].items()}
    in_actor = sum(part["stages"] for part in parts) / sum(part["rows"] for part in parts)
    stages = dict(zip(STAGES, in_actor.tolist(), strict=True))
    return {
        "images": sum(part["rows_in_all"] for part in parts),
        "images_measured": sum(part["rows"] for part in parts),
        "images_per_second": images_per_second,
        "waited": min(part["waited"] for part in parts),
        "actor_cores": parts[0]["cpu"]["actor"] / parts[0]["seconds"],
        "cpu_ms": sum(by_process.values()),
        "cpu_ms_by_process": by_process,
        "cpu_ms_by_stage": tables.by_stage(stages, by_process),
        "stats": parts[0]["stats"],
    }


def edge_turns(actors: int, layout: Layout) -> int:
    """Return a rank's blocks to omit at either end: more than two in each actor and one ahead of each."""
    return -(-3 * actors // layout.world_size) + 2


def layout_of(arguments: argparse.Namespace, config: Config, consumers: int, actors: int) -> Layout:
    """Return the layout of one round; raise ConfigError if it is too short to omit both of its ends."""
    steps = steps_per_block(arguments.batch, crop_bytes(config.crops))
    if arguments.block_images:
        steps = max(1, arguments.block_images // arguments.batch)
    per_turn = steps * arguments.batch * consumers
    turns = arguments.images // arguments.rounds // per_turn
    layout = Layout(
        first_step=0,
        last_step=turns * steps,
        world_size=consumers,
        batch_size_per_worker=arguments.batch,
        steps_per_block=steps,
    )
    least = 2 * edge_turns(actors, layout) + 2
    if turns < least:
        raise ConfigError(
            f"--images={arguments.images} in --rounds={arguments.rounds} are {turns} blocks of "
            f"{steps * arguments.batch} for each of {consumers} consumers, {least} are needed; "
            f"take --images={least * per_turn * arguments.rounds}"
        )
    return layout


def measure(
    work: Work, pool: tuple[int, int], layout: Layout, rounds: int, alone: ProcessPoolExecutor
) -> dict[str, Any]:
    """Measure all rounds of one pool and number of consumers."""
    actors, threads = pool
    plan = ray_data.StreamPlan(
        source=ray.put(work.source),
        channel=RunChannel(),
        order=work.order,
        crops=work.crops,
        seed=0,
        augment_actors=(actors, actors),
        cpus_per_augment_actor=threads,
        cool_down_seconds=60,
    )
    cores = available_cores()
    measured: dict[str, list[dict[str, Any]]] = {"kernel": [], "block": [], "stream": []}
    for i in range(rounds):
        first = i * layout.last_step
        shifted = replace(layout, first_step=first, last_step=first + layout.last_step)
        blocks = [shifted.block(number) for number in range(shifted.num_blocks)]
        blocks = blocks[:: -(-len(blocks) * len(blocks[0]) // MOST_ALONE)]
        positions = np.concatenate(blocks)
        measured["kernel"].append(alone.submit(kernel_alone, work, positions, cores[-1]).result())
        measured["block"].append(alone.submit(blocks_alone, work, blocks, cores[-threads:]).result())
        measured["stream"].append(stream(plan, shifted))
    return tables.summary(pool, layout, measured, image_bytes=crop_bytes(work.crops))


def draw(folder: Path, count: int, layout: str) -> None:
    """Write `count` generated photographs of 0.2 megapixels as files, or as one Parquet shard."""
    files = augment_images.draw_photos(augment_images.KINDS["0.2 MP"], count)
    if layout == "folder":
        for number, data in enumerate(files):
            (folder / f"{number:05d}.jpg").write_bytes(data)
        return
    rows = max(1, (4 << 20) * count // sum(map(len, files)))
    table = pa.table({"image": pa.array(files, pa.binary())})
    pq.write_table(
        table, folder / "part.parquet", row_group_size=rows, compression="none", use_dictionary=False
    )


def pool_of(text: str) -> tuple[int, int]:
    """Parse a pool: `2x4` is 2 actors of 4 threads."""
    actors, _, threads = text.partition("x")
    if not (actors.isdecimal() and threads.isdecimal() and int(actors) and int(threads)):
        raise argparse.ArgumentTypeError(f"{text!r} is not actors x threads, such as 2x4")
    return int(actors), int(threads)


def main(argv: list[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vit_small_imagenet_vanilla", help="whose crops are made")
    parser.add_argument("--pools", nargs="+", type=pool_of, default=[(1, 1), (1, 2), (2, 1)], metavar="AxT")
    parser.add_argument("--consumers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--images", type=int, default=20_000, help="in all rounds of each line together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layout", choices=["folder", "parquet"], default="folder", help="of drawn images")
    parser.add_argument("--unique", type=int, default=500, help="how many are drawn")
    parser.add_argument("--path", default=None, help="data.path, instead of drawn images")
    parser.add_argument("--batch", type=int, default=64, help="images of a step of one consumer")
    parser.add_argument("--block-images", type=int, default=0, help="instead of layout.py's choice")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--stats", action="store_true", help="also print Ray Data's own of the last round")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    if min(arguments.images, arguments.rounds, arguments.unique, arguments.batch, *arguments.consumers) < 1:
        raise ConfigError("--images, --rounds, --unique, --batch and --consumers must be at least 1")
    most = max(threads for _, threads in arguments.pools)
    if most > len(available_cores()):
        raise ResourceError(
            f"--pools: {most} threads need a core each, this process has {len(available_cores())}"
        )
    with tempfile.TemporaryDirectory(prefix="dinoray-stream-") as folder:
        path = arguments.path or folder
        defaults = [] if arguments.path else _DRAWN
        config = load_config(arguments.recipe, None, [*defaults, *arguments.overrides, f"data.path={path}"])
        lines = [(pool, number) for pool in arguments.pools for number in arguments.consumers]
        layouts = [layout_of(arguments, config, number, pool[0]) for pool, number in lines]
        if arguments.path is None:
            draw(Path(folder), arguments.unique, arguments.layout)
        source = Source(config.data, build_manifest(config.data))
        order = source.order(seed=0)
        work = Work(source, order, config.crops)
        title = arguments.path or f"drawn images of 0.2 megapixels, {arguments.layout}"
        print(f"{source.num_images} images: {title}; {crop_bytes(config.crops):,} bytes of crops each\n")
        start_ray(
            config.resources.model_copy(
                update={
                    "train_workers": max(arguments.consumers),
                    "augment_actors": max(actors * threads for actors, threads in arguments.pools),
                    "cpus_per_augment_actor": 1,
                    "use_gpu": False,
                }
            ),
            verbose=False,
        )
        measured = []
        spawn = multiprocessing.get_context("spawn")  # forking a process with threads may hang
        with ProcessPoolExecutor(1, mp_context=spawn) as alone:
            for (pool, _), layout in zip(lines, layouts, strict=True):
                measured.append(measure(work, pool, layout, arguments.rounds, alone))
                print(f"measured {tables.name_of(measured[-1])}", file=sys.stderr, flush=True)
        ray.shutdown()
    print(tables.rates(measured), tables.stages(measured), tables.processes(measured), sep="\n\n")
    if arguments.stats:
        for line in measured:
            print(f"\nRay Data on {tables.name_of(line)}:\n\n```\n{line['stats'].strip()}\n```")
    if arguments.json:
        report = {"images": title, "lines": measured, "machine": machine(), "load": os.getloadavg()}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
