"""What a person reads of a plan: the figures, the nodes, time and dollars, other numbers of GPUs, the command."""

import contextlib
import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dinoray.jobs.cli.config import read_file
from dinoray.jobs.cluster.measure import Measured
from dinoray.jobs.cluster.plan_config import PlanConfig
from dinoray.jobs.cluster.step_lines import memory_rows, scaling_row
from dinoray.models.commands import command, command_words
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.cluster.cost import CostConfig
from dinoray.pipeline.planning.forecast import HEADROOM, LOCAL_SHARE, Forecast, forecast, with_workers
from dinoray.pipeline.planning.node_rates import (
    LINK_SHARE,
    STORE_SHARE,
    STREAM_IMAGES_PER_SECOND,
    STREAM_SHARE,
    Run,
    carried,
)
from dinoray.pipeline.planning.prices import PRICED
from dinoray.pipeline.storage.files import is_shared_path

Row = tuple[str, str]

_SMALL_GBIT = 10.0
"""The link that many nodes have, for comparison."""
_S3_REQUESTS = 5500
"""Reads a second of one prefix that S3 is documented to serve; it grows by itself, with refusals until then."""
_CHEAPER = 0.95
"""Another type of CPU node is named when the run costs less than this share with it."""


def figure_rows(measured: Measured) -> list[Row]:
    """The figures, each with where it comes from."""
    f, sources = measured.figures, measured.sources
    device = "per GPU" if measured.on_gpus else "per CPU"
    at_once = f", {f.images_per_request:,.0f} per request" if f.images_per_request > 1 else ""
    return [
        (
            "images",
            f"{measured.num_images:,} of {f.bytes_per_image / 1000:,.3g} kB{at_once} ({_both(sources)})",
        ),
        ("request", f"{f.latency_ms:.3g} ms ({sources['latency_ms']})"),
        (
            "crops",
            f"{f.images_per_second_per_cpu:,.0f} images/s per CPU ({sources['images_per_second_per_cpu']})",
        ),
        (
            "training",
            f"{f.images_per_second_per_gpu:,.0f} images/s {device} ({sources['images_per_second_per_gpu']})",
        ),
    ]


def _both(sources: dict[str, str]) -> str:
    return ", ".join(dict.fromkeys((sources["num_images"], sources["bytes_per_image"])))


def cluster_rows(config: PlanConfig, run: Run, measured: Measured, found: Forecast) -> list[Row]:
    """The plan of a cluster."""
    plan, away = config.plan, found.of_a_cpu_node
    workers = found.train_workers
    taken = f"{found.augment_cpus:.0f} CPUs, {found.augment_cpus / workers:.2g} per GPU"
    rows = [
        (
            "GPU nodes",
            f"{found.gpu_nodes} x {plan.gpu_node}, {found.spare_cpus:g} CPUs beside the train workers",
        ),
        (
            "CPU nodes",
            f"{found.cpu_nodes} x {plan.cpu_node}, {found.cpu_nodes / workers:.2g} per GPU; crops take {taken}, "
            f"with {HEADROOM - 1:.0%} to spare and {1 - STREAM_SHARE:.0%} for Ray",
        ),
    ]
    if found.cpu_nodes:
        rows.append(
            (
                "",
                f"each makes up to {away.images_per_second:,.0f} images/s, limited by {away.limit}: "
                f"{away.busy_cpus:.0f} of {plan.cpu.cpus} CPUs busy, {found.cpu_node_gbit:.1f} of "
                f"{plan.cpu.gbit:g} Gbit/s sent, {_read_gbit(run, measured, found):.1f} read from storage",
            )
        )
        rows += _cheaper(config, run, measured, found)
    small = carried(_SMALL_GBIT, run.crop_bytes)
    is_limit = "the limit" if found.gpu_node_gbit > LINK_SHARE * _SMALL_GBIT else "no limit"
    rows += [
        (
            "rate",
            f"{found.images_per_second:,.0f} images/s; with free data it would be {found.demand:,.0f}{_streams(found)}",
        ),
        (
            "network",
            f"a GPU node receives {found.gpu_node_gbit:.1f} of {plan.gpu.gbit:g} Gbit/s (crops, images and gradients); "
            f"{_SMALL_GBIT:g} Gbit/s at {LINK_SHARE:.0%} use carry {small:,.0f} images/s of "
            f"{run.crop_bytes / 1000:,.0f} kB and would be {is_limit}",
        ),
        *memory_rows(config, run, measured),
        scaling_row(config, run, measured),
        ("storage", _storage(measured, found)),
        ("object store", _store(config, found)),
        ("time", _time(run, found)),
        ("cost", _cost(found)),
        (
            "",
            f"{PRICED}; CPU nodes on spot, at {plan.spot_share:.0%}: check both. GPU-hours: "
            f"{found.hours * found.gpu_nodes * plan.gpu.gpus:,.0f}",
        ),
        (
            "",
            f"in one zone; across zones the crops, {found.crops_gb / 1000:,.1f} TB, would cost up to "
            f"${found.crops_gb * plan.dollars_per_gb_across_zones:,.0f} more",
        ),
        ("bottleneck", f"{found.bottleneck}: {found.remedy}"),
    ]
    return rows


def _streams(found: Forecast) -> str:
    if found.num_streams == 1:
        return ""
    return f"; one execution of Ray Data brings {STREAM_IMAGES_PER_SECOND:,}: set data.streams={found.num_streams}"


def machine_rows(run: Run, found: Forecast, cores: int) -> list[Row]:
    """The plan of a run that trains on this machine's CPUs."""
    return [
        ("machine", f"this one, {cores} CPUs: {run.train_workers} train workers beside the augment actors"),
        (
            "rate",
            f"{found.images_per_second:,.0f} images/s; with free data it would be {LOCAL_SHARE * found.demand:,.0f}",
        ),
        ("time", _time(run, found)),
        ("bottleneck", f"{found.bottleneck}: {found.remedy}"),
        (
            "",
            "to plan a GPU cluster, set plan.images_per_second_per_gpu, or run this job on a GPU node",
        ),
    ]


def _cheaper(config: PlanConfig, run: Run, measured: Measured, found: Forecast) -> list[Row]:
    """The type of CPU node with which the run costs least, if that is worth a line."""

    def with_type(name: str) -> Forecast:
        return forecast(run, measured.figures, config.plan.model_copy(update={"cpu_node": name}))

    fits = [
        n
        for n in config.plan.named(with_gpus=False)
        if config.plan.prices[n].cpus >= run.cpus_per_augment_actor
    ]
    found_by = {name: with_type(name) for name in fits}
    best = min(found_by, key=lambda name: found_by[name].total_dollars)
    if found_by[best].dollars["cpu"] > _CHEAPER * found.dollars["cpu"]:
        return []
    other = found_by[best]
    saved = found.total_dollars - other.total_dollars
    return [("", f"plan.cpu_node={best} would take {other.cpu_nodes} nodes and cost ${saved:,.0f} less")]


def _read_gbit(run: Run, measured: Measured, found: Forecast) -> float:
    """Gbit/s of encoded images into a CPU node, as many as it sends crops of."""
    return found.cpu_node_gbit * measured.figures.bytes_per_image / run.crop_bytes


def _storage(measured: Measured, found: Forecast) -> str:
    f = measured.figures
    requests = found.images_per_second / f.images_per_request
    text = f"{requests:,.0f} requests/s, {found.images_per_second * f.bytes_per_image / 1e6:,.0f} MB/s"
    if requests <= _S3_REQUESTS:
        return text
    text += f"; S3 documents {_S3_REQUESTS:,} requests/s per prefix: "
    return f"{text}use several prefixes, or pack images with `{command('pack')}`"


def _store(config: PlanConfig, found: Forecast) -> str:
    plan = config.plan
    parts = [f"{found.gpu_node_store_gib:.0f} of {STORE_SHARE * plan.gpu.memory_gib:.0f} GiB on a GPU node"]
    if found.cpu_nodes:
        parts.append(
            f"{found.cpu_node_store_gib:.0f} of {STORE_SHARE * plan.cpu.memory_gib:.0f} GiB on a CPU node"
        )
    return ", ".join(parts)


def _time(run: Run, found: Forecast) -> str:
    return (
        f"{_hours(3600 * found.hours)}: {run.total_steps:,} steps of {run.global_batch_size} in "
        f"{_hours(found.training_seconds)}, evaluations and checkpoints {_hours(found.pause_seconds)}, startup and "
        f"shutdown {_hours(found.startup_seconds)}"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _cost(found: Forecast) -> str:
    names = {"gpu": "GPU nodes", "cpu": "CPU nodes", "head": "head", "requests": "requests to storage"}
    parts = ", ".join(f"{name} ${found.dollars[kind]:,.0f}" for kind, name in names.items())
    return f"${found.total_dollars:,.0f}: {parts}"


def other_sizes(config: PlanConfig, run: Run, measured: Measured) -> list[Forecast]:
    """Forecasts for other numbers of GPUs that divide the batch, at the same rate of a GPU."""
    found = []
    for size in sorted({1, 2, 4, 8, run.train_workers, 2 * run.train_workers}):
        if run.global_batch_size % (size * config.train.accumulate_steps) == 0:
            with contextlib.suppress(ConfigError):  # a node has not the CPUs for so many
                found.append(forecast(with_workers(run, size), measured.figures, config.plan))
    return found


def size_table(forecasts: Sequence[Forecast]) -> list[str]:
    """A line for each number of GPUs, under a head."""
    rows = [("GPUs", "GPU nodes", "CPU nodes", "images/s", "hours", "dollars", "bottleneck")]
    rows += [
        (
            str(f.train_workers),
            str(f.gpu_nodes),
            str(f.cpu_nodes),
            f"{f.images_per_second:,.0f}",
            f"{f.hours:,.1f}",
            f"{f.total_dollars:,.0f}",
            f.bottleneck,
        )
        for f in forecasts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row[:-1], widths)) + f"  {row[-1]}" for row in rows]


def settings_of(config: PlanConfig, found: Forecast) -> dict[str, Any]:
    """Settings of a run that follow from the plan of a cluster."""
    plan, (least, most) = config.plan, found.augment_actors
    cost = CostConfig(
        head_hourly=plan.head.hourly,
        cpu_hourly=round(plan.cpu.hourly * plan.spot_share, 4),
        gpu_hourly=plan.gpu.hourly,
    )
    streams = max(config.data.streams, found.num_streams)
    return {
        **({"data.streams": streams} if streams > 1 else {}),
        "resources.use_gpu": "true",
        "resources.train_workers": found.train_workers,
        "resources.augment_actors": f"[{least},{most}]",
        **{f"cost.{name}": f"{value:g}" for name, value in cost.model_dump().items()},
    }


def run_command(arguments: Namespace, config: PlanConfig, settings: dict[str, Any]) -> str:
    """The command that starts the planned run: the arguments given here without the plan's own, a name, `settings`."""
    kept = [word for word in arguments.overrides if word.partition("=")[0] not in settings]
    kept = [word for word in kept if word.partition("=")[0].partition(".")[0] != "plan"]
    words = command_words("pretrain", "--recipe", config.recipe)
    words += _from_file(arguments.config) if arguments.config else []
    named = {word.partition("=")[0] for word in kept}
    words += [*([] if "name" in named else [f"name={config.name}"]), *kept]
    if settings:
        shared = is_shared_path(config.storage_path)
        asked = dict([config.data.address.split("=", 1)])
        asked |= {"storage_path": config.storage_path if shared else "s3://BUCKET/runs"}
        words += [f"{key}={value}" for key, value in asked.items() if key not in named]
        words += [f"{key}={value}" for key, value in settings.items()]
        words = command_words("submit", "--", *words)
    return shlex.join(words)


def _from_file(file: Path) -> list[str]:
    """The file, if it has no settings of the plan, which a run does not know; else its other ones."""
    tree = read_file(file, "--config")
    if "plan" not in tree:
        return ["--config", str(file)]
    others = flatten({key: value for key, value in tree.items() if key not in ("plan", "recipe")})
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in others]


def show(rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Rows under one another, their names in a column."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        say(f"{name:{width}}  {text}".rstrip())
