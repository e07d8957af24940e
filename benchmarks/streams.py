"""What several streams bring: executions of Ray Data that share the images of a run, `data.streams` of them.

    python benchmarks/streams.py [--streams 1 2 4] [--consumers 4] [--actors 4] [--images 12288] [--rounds 3]
                                 [--block-images 16] [--unique 200] [--json FILE] [key=value ...]

The coordinator of an execution is one Python process with about the same work for each block, whatever is in it. So
crops are tiny here: blocks cost little to make, and the coordinators are the limit once there are cores for them and
for the actors. Consumers do nothing but touch what arrives. All numbers of streams take turns, round by round, with
the same images and the same actors in all. Images/s of blocks of the published crops are about 200 times the blocks/s.

"A coordinator's cores" near 1 says that coordinators are the limit: only then do more of them bring more. On few cores
actors, consumers and Ray compete with them; CPU ms a block, of the coordinators and of the whole Ray session, says what
a block costs then. As in benchmarks/stream.py, start-up is left out.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from augment_tables import machine
from stream import edge_turns, stream
from stream_tables import markdown

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main, start_ray
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.partition import Layout, check_streams
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.stream.ray_data import StreamPlan
from dinoray.pipeline.worker.config import Config

TINY = ["crops.global_crop_size=32", "crops.local_crop_size=16", "crops.num_local_crops=1"]


def layout_of(arguments: argparse.Namespace) -> Layout:
    """Return the layout of one round, one step in a block; ConfigError if it is too short to omit both ends."""
    per_turn = arguments.block_images * arguments.consumers
    turns = arguments.images // per_turn
    layout = Layout(
        first_step=0,
        last_step=turns,
        world_size=arguments.consumers,
        batch_size_per_worker=arguments.block_images,
        steps_per_block=1,
    )
    least = 2 * edge_turns(arguments.actors, layout) + 2
    if turns < least:
        raise ConfigError(
            f"--images={arguments.images} are {turns} blocks for each consumer, {least} are needed; "
            f"take --images={least * per_turn}"
        )
    return layout


def measure(arguments: argparse.Namespace, config: Config, layout: Layout) -> list[dict[str, Any]]:
    """Measure all numbers of streams in turns; return one line for each, with medians over the rounds."""
    source = Source(config.data, build_manifest(config.data))
    plan = StreamPlan(
        source=ray.put(source),
        channel=RunChannel(),
        order=source.order(seed=0),
        crops=config.crops,
        seed=0,
        augment_actors=(arguments.actors, arguments.actors),
        cpus_per_augment_actor=1,
        cool_down_seconds=60,
    )
    rounds: dict[int, list[dict[str, Any]]] = {number: [] for number in arguments.streams}
    for turn in range(arguments.rounds):
        first = turn * layout.last_step
        shifted = replace(layout, first_step=first, last_step=first + layout.last_step)
        for number in arguments.streams:
            # A channel of its own: the size of a pool is kept there for the pool of the next leg.
            measured = stream(replace(plan, num_streams=number, channel=RunChannel()), shifted)
            rounds[number].append(round_of(measured, number, images_per_block=arguments.block_images))
    return [
        {
            "streams": number,
            **{name: statistics.median(r[name] for r in found) for name in found[0]},
            "rounds": found,
        }
        for number, found in rounds.items()
    ]


def round_of(measured: Mapping[str, Any], num_streams: int, *, images_per_block: int) -> dict[str, float]:
    """Return the figures of one round by block, from those of benchmarks/stream.py by image."""
    blocks_per_second = measured["images_per_second"] / images_per_block
    coordinators_ms = measured["cpu_ms_by_process"]["coordinator"] * images_per_block
    return {
        "images_per_second": measured["images_per_second"],
        "blocks_per_second": blocks_per_second,
        "coordinators_cpu_ms": coordinators_ms,
        "coordinator_cores": coordinators_ms * blocks_per_second / 1000 / num_streams,
        "session_cpu_ms": measured["cpu_ms"] * images_per_block,
        "waited": measured["waited"],
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines as a Markdown table."""
    head = [
        "streams", "images/s", "blocks/s", "CPU ms a block, coordinators", "all processes", "a coordinator's cores",
        "consumers waited",
    ]  # fmt: skip
    return markdown(
        head,
        [
            [
                str(line["streams"]),
                f"{line['images_per_second']:,.0f} ({_range(line['rounds'], 'images_per_second', ',.0f')})",
                f"{line['blocks_per_second']:.1f}",
                f"{line['coordinators_cpu_ms']:.1f} ({_range(line['rounds'], 'coordinators_cpu_ms', '.1f')})",
                f"{line['session_cpu_ms']:.1f}",
                f"{line['coordinator_cores']:.2f}",
                f"{line['waited']:.0%}",
            ]
            for line in lines
        ],
    )


def _range(rounds: Sequence[Mapping[str, float]], name: str, form: str) -> str:
    values = [r[name] for r in rounds]
    return f"{min(values):{form}} to {max(values):{form}}"


def main(argv: list[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", help="whose other settings are taken")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--consumers", type=int, default=4, help="train workers")
    parser.add_argument("--actors", type=int, default=4, help="augment actors of all streams together")
    parser.add_argument("--images", type=int, default=12_288, help="in each round of each number of streams")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-images", type=int, default=16, help="images of a block")
    parser.add_argument("--unique", type=int, default=200, help="how many are drawn")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    positive = (
        arguments.images,
        arguments.rounds,
        arguments.block_images,
        arguments.unique,
        *arguments.streams,
    )
    if min(*positive, arguments.consumers, arguments.actors) < 1:
        raise ConfigError("all numbers must be at least 1")
    check_streams(max(arguments.streams), train_workers=arguments.consumers, most_actors=arguments.actors)
    layout = layout_of(arguments)
    with tempfile.TemporaryDirectory(prefix="dinoray-streams-") as folder:
        for number in range(arguments.unique):
            Path(folder, f"{number:05d}.jpg").write_bytes(draw_demo_image("dots", "train", number))
        config = load_config(arguments.recipe, None, [*TINY, *arguments.overrides, f"data.path={folder}"])
        print(
            f"{arguments.consumers} consumers, {arguments.actors} augment actors, blocks of "
            f"{arguments.block_images} images of {crop_bytes(config.crops):,} bytes of crops, {os.cpu_count()} CPUs\n"
        )
        start_ray(
            config.resources.model_copy(
                update={"train_workers": 1, "augment_actors": arguments.actors, "use_gpu": False}
            ),
            verbose=False,
        )
        lines = measure(arguments, config, layout)
        ray.shutdown()
    print(table(lines))
    if arguments.json:
        report = {"lines": lines, "machine": machine(), "load": os.getloadavg()}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
