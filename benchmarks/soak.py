"""Memory of the stream over half an hour, with a slow consumer, images of up to 48 megapixels and a small object store.

    python benchmarks/soak.py [--minutes 30] [--batch 16] [--pause-seconds 8] [--store-megabytes 600]
                              [--json FILE] [--picture benchmarks/soak.png]

Seven of ten images have 0.2 megapixels, two 12 and one 48. The consumer takes a batch, and the next one after a pause;
actors would make crops many times as fast, so all that may be held is held. Every five seconds: memory that processes
of the Ray session have for themselves (USS), the objects in the store, and files that Ray has spilled. Prints a table
for RESULTS.md, and exits with 1 if something was spilled, a process was replaced, or memory grew after a third of the
time by more than a twentieth.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import augment_images
import numpy as np
import psutil
import ray
from augment_images import Kind
from matplotlib.figure import Figure
from stream_tables import role_of

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.augment.config import CropsConfig, crop_bytes
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.partition import block_bytes_for, lay_out
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.stream import ray_data

_EVERY_SECONDS = 5.0
_SIZES = {
    Kind(500, 375, 0, 4.5): (20, 7),
    Kind(4000, 3000, 2, 2.5): (4, 2),
    Kind(8000, 6000, 2, 1.5): (2, 1),
}
"""Of each kind: how many are drawn, and how many of ten images are of it."""
_NUM_IMAGES, _ACTORS, _CPUS_PER_ACTOR = 4000, 2, 2
_MOST_GROWTH = 1.05


def write_images(folder: Path) -> None:
    """Write _NUM_IMAGES names; images of a kind are links to the few that are drawn."""
    names = iter(range(_NUM_IMAGES))
    for kind, (count, of_ten) in _SIZES.items():
        for data in augment_images.draw_photos(kind, count):
            first = folder / f"{next(names):05d}.jpg"
            first.write_bytes(data)
            for _ in range(_NUM_IMAGES * of_ten // 10 // count - 1):
                os.link(first, folder / f"{next(names):05d}.jpg")


class Watch(threading.Thread):
    """Samples of this process and all that it has started, until `end`."""

    def __init__(self, temp_dir: Path) -> None:
        super().__init__(daemon=True)
        self._temp_dir, self._ended, self._began = temp_dir, threading.Event(), time.monotonic()
        self.samples: list[dict[str, Any]] = []
        self.actors: set[int] = set()

    def run(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self.samples.append(self._sample())

    def end(self) -> None:
        """Take no more samples."""
        self._ended.set()
        self.join()

    def _sample(self) -> dict[str, Any]:
        bytes_of: dict[str, int] = defaultdict(int)
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                role = "driver" if process == me else role_of(" ".join(process.cmdline()))
                memory = process.memory_full_info()
            except psutil.Error:
                continue
            bytes_of[role or "others"] += memory.uss
            if role == "actor":
                self.actors.add(process.pid)
        store = "object_store_memory"
        bytes_of["object store"] = int(
            ray.cluster_resources()[store] - ray.available_resources().get(store, 0)
        )
        spilled = [path for path in self._temp_dir.rglob("ray_spilled_objects*/*") if path.is_file()]
        return {"second": time.monotonic() - self._began, "bytes": dict(bytes_of), "spilled": len(spilled)}


def in_all(sample: dict[str, Any]) -> int:
    """Return the bytes of all roles of a sample."""
    return sum(sample["bytes"].values())


def thirds(values: list[float]) -> tuple[float, float]:
    """Return the medians of the second and of the last third."""
    third = len(values) // 3
    return float(np.median(values[third : 2 * third])), float(np.median(values[2 * third :]))


def table(samples: list[dict[str, Any]]) -> str:
    """Return the medians of the second, and of the last, third of the samples, and the most, in MB."""
    roles = sorted({role for sample in samples for role in sample["bytes"]})
    lines = ["| MB | second third | last third | most |", "|---|---|---|---|"]
    for role in [*roles, "all"]:
        values = [in_all(s) if role == "all" else s["bytes"].get(role, 0) for s in samples]
        found = *thirds(values), max(values)
        lines.append(f"| {role} | {' | '.join(f'{value / 1e6:.0f}' for value in found)} |")
    return "\n".join(lines)


def draw(samples: list[dict[str, Any]]) -> Figure:
    """Draw the memory by role over time."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    minutes = [sample["second"] / 60 for sample in samples]
    axes.plot(minutes, [in_all(s) / 1e9 for s in samples], label="all", color="black")
    for role in sorted({role for sample in samples for role in sample["bytes"]}):
        axes.plot(minutes, [s["bytes"].get(role, 0) / 1e9 for s in samples], label=role)
    axes.set(xlabel="minutes", ylabel="GB", ylim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(argv: list[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pause-seconds", type=float, default=8.0, help="between two batches")
    parser.add_argument("--store-megabytes", type=int, default=600)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument(
        "--picture", type=Path, default=Path(__file__).parent / "soak.png", metavar="FILE.png"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as name:
        folder, temp_dir = Path(name, "images"), Path(name, "ray")
        folder.mkdir()
        write_images(folder)
        config = DataConfig(path=str(folder))
        source = Source(config, build_manifest(config))
        crops = CropsConfig()
        num_steps = int(60 * arguments.minutes / arguments.pause_seconds)
        layout = lay_out(
            range(num_steps),
            world_size=1,
            global_batch_size=arguments.batch,
            image_bytes=crop_bytes(crops),
            block_bytes=block_bytes_for(arguments.store_megabytes * 10**6),
        )
        ray.init(
            num_cpus=_ACTORS * _CPUS_PER_ACTOR + 1,
            object_store_memory=arguments.store_megabytes * 10**6,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(temp_dir),
        )
        watch = Watch(temp_dir)
        try:
            plan = ray_data.StreamPlan(
                source=ray.put(source),
                channel=RunChannel(),
                order=source.order(0),
                crops=crops,
                seed=0,
                augment_actors=(_ACTORS, _ACTORS),
                cpus_per_augment_actor=_CPUS_PER_ACTOR,
                cool_down_seconds=60,
            )
            (split,) = ray_data.open_splits(plan, layout)
            watch.start()
            images, bad = 0, 0
            for batch in ray_data.batches(split, layout, rank=0, prefetch_batches=1):
                images, bad = images + len(batch["position"]), bad + int(np.count_nonzero(batch["status"]))
                time.sleep(arguments.pause_seconds)  # the slow consumer
            watch.end()
        finally:
            ray.shutdown()
    # Actors end once the last blocks are made, which the consumer has still to read.
    last = max(number for number, sample in enumerate(watch.samples) if "actor" in sample["bytes"])
    samples = watch.samples[: last + 1]
    second, last_third = thirds([*map(in_all, samples)])
    growth = last_third / second
    spilled = max(sample["spilled"] for sample in samples)
    minutes = watch.samples[-1]["second"] / 60
    print(f"{images} images, {bad} of them bad, in {minutes:.0f} min\n")
    print(table(samples))
    print(f"\nspilled files: {spilled}; actors: {len(watch.actors)} of {_ACTORS}; growth: {growth - 1:+.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(samples))
    draw(samples).savefig(arguments.picture, dpi=110)
    if spilled or bad or len(watch.actors) != _ACTORS or growth > _MOST_GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
