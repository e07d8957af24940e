"""Results of benchmarks/stream.py as ratios and Markdown tables.

The input is figures, whatever their source.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dinoray.pipeline.data.partition import Layout

STAGES = ("fetch", "decode", "crop", "serialise", "deliver", "collate", "idle")
"""Stages of an image's CPU time.

Serialise is an actor's time outside the first three: it builds blocks and copies them to the object store.
Deliver is the scheduling and accounting of blocks: coordinator, raylet, GCS, driver. Collate is the
consumers. Idle is the base load of the session's other processes, agents and statistics. It is constant per
second whatever the stream does, and not much larger on a large cluster.
"""
_ROLES = {
    "MultiCropActor": "actor",
    "consume": "consumers",
    "SplitCoordinator": "coordinator",
    "raylet/raylet": "raylet",
    "gcs_server": "gcs",
}
PROCESSES = (*_ROLES.values(), "driver", "others")


def role_of(title: str) -> str | None:
    """Return the role of a process of the session, from its command line; None outside Ray."""
    if "multiprocessing" in title:
        return None
    return next((role for part, role in _ROLES.items() if part in title), "others")


def by_stage(in_actor: Mapping[str, float], by_process: Mapping[str, float]) -> dict[str, float]:
    """Return CPU milliseconds per image in each of STAGES; they sum to the total of all processes."""
    return {
        **in_actor,
        "serialise": by_process["actor"] - sum(in_actor.values()),
        "deliver": sum(by_process.get(role, 0.0) for role in ("coordinator", "raylet", "gcs", "driver")),
        "collate": by_process["consumers"],
        "idle": by_process.get("others", 0.0),
    }


def summary(
    pool: tuple[int, int], layout: Layout, measured: Mapping[str, list[dict[str, Any]]], *, image_bytes: int
) -> dict[str, Any]:
    """Return medians over the rounds, ratios round by round, and the rounds themselves."""
    actors, threads = pool
    kernel, block, stream = (measured[side] for side in ("kernel", "block", "stream"))

    def median(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
        return statistics.median(r[name] for r in rounds)

    by_clock = [
        s["images_per_second"] / (k["images_per_second"] * actors * threads)
        for k, s in zip(kernel, stream, strict=True)
    ]
    by_cpu = [k["cpu_ms"] / s["cpu_ms"] for k, s in zip(kernel, stream, strict=True)]
    return {
        "actors": actors,
        "threads": threads,
        "consumers": layout.world_size,
        "images_per_block": layout.steps_per_block * layout.batch_size_per_worker,
        "bytes_per_image": image_bytes,
        "kernel_images_per_second": median(kernel, "images_per_second"),
        "kernel_cpu_ms": median(kernel, "cpu_ms"),
        "block_images_per_second": median(block, "images_per_second"),
        "block_cpu_ms": median(block, "cpu_ms"),
        "stream_images_per_second": median(stream, "images_per_second"),
        "stream_cpu_ms": median(stream, "cpu_ms"),
        "ratio_by_clock": statistics.median(by_clock),
        "ratio_by_clock_range": [min(by_clock), max(by_clock)],
        "ratio_by_cpu": statistics.median(by_cpu),
        "ratio_by_cpu_range": [min(by_cpu), max(by_cpu)],
        "waited": median(stream, "waited"),
        "actor_cores": median(stream, "actor_cores"),
        "cpu_ms_by_stage": {
            name: statistics.mean(r["cpu_ms_by_stage"][name] for r in stream) for name in STAGES
        },
        "cpu_ms_by_process": {
            name: statistics.mean(r["cpu_ms_by_process"].get(name, 0.0) for r in stream) for name in PROCESSES
        },
        "stats": stream[-1]["stats"],
        "rounds": {
            side: [{k: v for k, v in r.items() if k != "stats"} for r in measured[side]] for side in measured
        },
    }


def name_of(line: Mapping[str, Any]) -> str:
    """Return the pool and the consumers of a table line."""
    return f"{line['actors']}x{line['threads']}, {line['consumers']} consumer{'s' * (line['consumers'] > 1)}"


def rates(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of images/s of the three sides, and the two ratios."""
    head = [
        "actors x threads", "images a block", "kernel, one core", "blocks, no Ray", "stream", "by the clock",
        "by CPU", "actors' cores", "consumers waited",
    ]  # fmt: skip
    return markdown(
        head,
        [
            [
                name_of(line),
                str(line["images_per_block"]),
                f"{line['kernel_images_per_second']:.1f}",
                f"{line['block_images_per_second']:.1f}",
                f"{line['stream_images_per_second']:.1f}",
                _ratio(line, "ratio_by_clock"),
                _ratio(line, "ratio_by_cpu"),
                f"{line['actor_cores']:.2f}",
                f"{line['waited']:.0%}",
            ]
            for line in lines
        ],
    )


def stages(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of CPU milliseconds per image: kernel, blocks, and the stream by stage."""
    head = ["CPU ms an image", "kernel", "blocks", *(f"stream: {STAGES[0]}", *STAGES[1:]), "sum"]
    return markdown(
        head,
        [
            [name_of(line), f"{line['kernel_cpu_ms']:.2f}", f"{line['block_cpu_ms']:.2f}"]
            + [f"{line['cpu_ms_by_stage'][name]:.2f}" for name in STAGES]
            + [f"{line['stream_cpu_ms']:.2f}"]
            for line in lines
        ],
    )


def processes(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of CPU ms per image, and seconds per GB of crops, for each process of the session."""
    head = ["CPU ms an image (s a GB)", *PROCESSES, "sum"]

    def cell(ms: float, image_bytes: int) -> str:
        return f"{ms:.2f} ({1e6 * ms / image_bytes:.2f})"

    return markdown(
        head,
        [
            [
                name_of(line),
                *(cell(line["cpu_ms_by_process"][name], line["bytes_per_image"]) for name in PROCESSES),
                cell(line["stream_cpu_ms"], line["bytes_per_image"]),
            ]
            for line in lines
        ],
    )


def _ratio(line: Mapping[str, Any], name: str) -> str:
    low, high = line[f"{name}_range"]
    return f"{line[name]:.2f}" + (f" ({low:.2f} to {high:.2f})" if high > low else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
