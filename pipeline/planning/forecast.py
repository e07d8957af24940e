"""Forecast of a run: images/s, nodes, hours, dollars and the bottleneck. Pure arithmetic; no Ray here.

GPU nodes augment on their spare CPUs. CPU nodes do the rest, with 20% headroom. GPU speed limits the run,
unless network links or a ceiling on augment actors limit it further.
"""

import math
from dataclasses import dataclass, replace

from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.pipeline.planning.node_rates import (
    BLOCKS_PER_ACTOR,
    LINK_SHARE,
    STREAM_SHARE,
    Augmenting,
    Figures,
    Limit,
    Run,
    augmenting,
    bytes_into_a_gpu_node,
    fetched_per_actor,
    streams_for,
)
from dinoray.pipeline.planning.prices import PlanSettings

HEADROOM = 1.2
"""CPUs as a multiple of the demand, to cover variation: image sizes, lost spot nodes, evaluations."""
LOCAL_SHARE = 0.75
"""Share of one machine's cores for crops and steps; Ray takes a fifth, and workers wait for each other."""
LOCAL_STARTUP_SECONDS = 30.0
"""Seconds until a run on one machine trains: Ray, the workers, the first block."""
_DISK_BYTES_PER_SECOND = 500e6
"""Rate at which a checkpoint is written before training continues."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run. Rates are images/s, `*_gbit` is per node, dollars are split by item."""

    train_workers: int
    gpu_nodes: int
    cpu_nodes: int
    demand: float
    images_per_second: float
    bottleneck: Limit
    remedy: str
    num_streams: int
    augment_actors: tuple[int, int]
    augment_cpus: float
    spare_cpus: float
    of_a_cpu_node: Augmenting
    gpu_node_gbit: float
    cpu_node_gbit: float
    gpu_node_store_gib: float
    cpu_node_store_gib: float
    training_seconds: float
    pause_seconds: float
    startup_seconds: float
    dollars: dict[str, float]
    crops_gb: float

    @property
    def hours(self) -> float:
        """Return the hours from the start of the nodes to the end of the last node."""
        return (self.training_seconds + self.pause_seconds + self.startup_seconds) / 3600

    @property
    def total_dollars(self) -> float:
        """Return the sum of all cost items."""
        return sum(self.dollars.values())


def forecast(run: Run, figures: Figures, plan: PlanSettings) -> Forecast:
    """Return the forecast for `run.train_workers` GPUs; raise ConfigError if a GPU node cannot hold them."""
    gpu, workers = plan.gpu, run.train_workers
    workers_per_node = min(gpu.gpus, workers)
    if workers_per_node * run.cpus_per_train_worker > gpu.cpus:
        raise ConfigError(
            f"resources.cpus_per_train_worker={run.cpus_per_train_worker:g} for each of {workers_per_node} GPUs "
            f"are more than the {gpu.cpus} CPUs of plan.gpu_node={plan.gpu_node}; "
            f"set resources.cpus_per_train_worker={gpu.cpus // workers_per_node}"
        )
    gpu_nodes = math.ceil(workers / gpu.gpus)
    # One CPU of the cluster stays free for Ray's own small tasks.
    spare = max(0.0, gpu_nodes * gpu.cpus - workers * run.cpus_per_train_worker - 1)
    at_home = augmenting(gpu, spare / gpu_nodes, run, figures, sends=False)
    away = augmenting(plan.cpu, plan.cpu.cpus, run, figures, sends=True)
    if not away.actors:
        raise ConfigError(
            f"resources.cpus_per_augment_actor={run.cpus_per_augment_actor:g} is more than the {plan.cpu.cpus} CPUs "
            f"of plan.cpu_node={plan.cpu_node}; set resources.cpus_per_augment_actor=1"
        )
    cap = math.inf if run.most_actors is None else run.most_actors
    home_actors = min(cap, gpu_nodes * at_home.actors)
    home_rate = at_home.images_per_second * home_actors / max(1, at_home.actors)
    most_cpu_nodes = math.inf if cap == math.inf else math.ceil((cap - home_actors) / max(1, away.actors))

    def cpu_nodes_for(rate: float) -> int:
        missing = max(0.0, HEADROOM * rate - home_rate)
        return int(min(most_cpu_nodes, math.ceil(missing / away.images_per_second - 1e-9)))

    def made_by(cpu_nodes: int) -> float:
        away_actors = min(cap - home_actors, cpu_nodes * away.actors)
        return home_rate + away.images_per_second * away_actors / max(1, away.actors)

    demand = workers * figures.images_per_second_per_gpu
    cpu_nodes = cpu_nodes_for(demand)
    made = min(max(home_rate, HEADROOM * demand), made_by(cpu_nodes))
    into_node = bytes_into_a_gpu_node(
        run, figures, share=workers_per_node / workers, made=made, home=home_rate / gpu_nodes
    )
    link = LINK_SHARE * gpu.gbit * 1e9 / 8
    by_link = link / into_node if into_node else math.inf
    if by_link < demand:
        cpu_nodes = cpu_nodes_for(by_link)
    limits: dict[Limit, float] = {"training step": demand, "network": by_link}
    augments = away if cpu_nodes else at_home
    held_by = augments.limit if augments.limit != "network" else "augmentation"
    limits[held_by] = min(limits.get(held_by, math.inf), made_by(cpu_nodes))
    bottleneck = min(limits, key=lambda name: limits[name])
    rate = limits[bottleneck]

    home_least = math.ceil(rate / at_home.images_per_second * at_home.actors) if at_home.actors else 0
    home_most = math.ceil(HEADROOM * home_least)
    if cpu_nodes:  # request all nodes at once at start; the remaining actors follow demand
        most = int(min(cap, home_actors + cpu_nodes * away.actors))
        least = int(min(most, home_actors + (cpu_nodes - 1) * away.actors + 1))
    else:
        most = int(max(1, min(home_actors, home_most)))
        least = int(max(1, min(most, home_least)))
    pause = _pause_seconds(
        run, figures, decoding_cpus=gpu_nodes * gpu.cpus, training_seconds=run.images / rate
    )
    startup = 60 * plan.startup_minutes
    hours = (run.images / rate + pause + startup) / 3600
    reads = (run.images + run.evaluations * run.images_per_evaluation) / figures.images_per_request
    per_worker_bytes = run.global_batch_size // workers * run.crop_bytes
    return Forecast(
        train_workers=workers,
        gpu_nodes=gpu_nodes,
        cpu_nodes=cpu_nodes,
        demand=demand,
        images_per_second=rate,
        bottleneck=bottleneck,
        remedy=_remedy(bottleneck, plan),
        num_streams=min(most, streams_for(rate, workers)),
        augment_actors=(least, most),
        augment_cpus=HEADROOM * rate / (STREAM_SHARE * figures.images_per_second_per_cpu),
        spare_cpus=spare,
        of_a_cpu_node=away,
        gpu_node_gbit=rate * into_node * 8 / 1e9,
        cpu_node_gbit=max(0.0, rate - home_rate) / max(1, cpu_nodes) * run.crop_bytes * 8 / 1e9,
        gpu_node_store_gib=(
            workers_per_node * (run.prefetch_batches * per_worker_bytes + 2 * run.block_bytes)
            + min(at_home.actors, most) * BLOCKS_PER_ACTOR * run.block_bytes
        )
        / 2**30,
        cpu_node_store_gib=away.actors * BLOCKS_PER_ACTOR * run.block_bytes / 2**30 if cpu_nodes else 0.0,
        training_seconds=run.images / rate,
        pause_seconds=pause,
        startup_seconds=startup,
        dollars={
            "head": hours * plan.head.hourly,
            "cpu": hours * cpu_nodes * plan.cpu.hourly * plan.spot_share,
            "gpu": hours * gpu_nodes * gpu.hourly,
            "requests": reads / 1e6 * plan.dollars_per_million_requests,
        },
        crops_gb=run.images * run.crop_bytes / 1e9,
    )


def _pause_seconds(run: Run, figures: Figures, *, decoding_cpus: float, training_seconds: float) -> float:
    """Return the seconds of evaluations, each worker embedding its share, and of writing checkpoints."""
    embedded = run.train_workers * figures.images_per_second_per_gpu * run.forwards_per_image
    rate = min(embedded, decoding_cpus * figures.images_per_second_per_cpu)
    # Student, teacher and the optimizer's two moments, each as large as the gradients.
    saved = 4 * run.gradient_bytes / _DISK_BYTES_PER_SECOND
    interval = run.checkpoint.interval_seconds(saved)
    by_time = 0 if interval is None else training_seconds / interval
    return run.pausing_evaluations * run.images_per_evaluation / rate + (run.checkpoints + by_time) * saved


def forecast_here(run: Run, figures: Figures, plan: PlanSettings, *, cores: int) -> Forecast:
    """Return the forecast for a run whose workers train on this machine's CPUs, beside its augment actors.

    An image takes the time of its crops and of its step, on any core. At most as many cores as processes are
    used.
    """
    crop, step = 1 / figures.images_per_second_per_cpu, 1 / figures.images_per_second_per_gpu
    rate = LOCAL_SHARE * cores / (crop + step)
    limits: dict[Limit, float] = {"training step": rate}
    actors = run.most_actors or max(1, cores - run.train_workers)
    limits["augmentation"] = STREAM_SHARE * actors * run.cpus_per_augment_actor / crop
    limits["S3 latency"] = actors * fetched_per_actor(run, figures)
    bottleneck = min(limits, key=lambda name: limits[name])
    rate = limits[bottleneck]
    if bottleneck == "training step" and crop > step:
        bottleneck = "augmentation"
    pause = run.evaluations * run.images_per_evaluation * (crop + step / run.forwards_per_image) / cores
    return Forecast(
        train_workers=run.train_workers,
        gpu_nodes=0,
        cpu_nodes=0,
        demand=cores / step,
        images_per_second=rate,
        bottleneck=bottleneck,
        remedy=_remedy(bottleneck, plan),
        num_streams=1,
        augment_actors=(actors, actors),
        augment_cpus=rate * crop,
        spare_cpus=0.0,
        of_a_cpu_node=Augmenting(0.0, "augmentation", 0, 0.0),
        gpu_node_gbit=0.0,
        cpu_node_gbit=0.0,
        gpu_node_store_gib=0.0,
        cpu_node_store_gib=0.0,
        training_seconds=run.images / rate,
        pause_seconds=pause,
        startup_seconds=LOCAL_STARTUP_SECONDS,
        dollars={},
        crops_gb=run.images * run.crop_bytes / 1e9,
    )


def with_workers(run: Run, workers: int) -> Run:
    """Return the same run on `workers` GPUs."""
    return replace(run, train_workers=workers)


def _remedy(bottleneck: Limit, plan: PlanSettings) -> str:
    """Return one sentence with the remedy for a bottleneck."""
    shrink = command("pack", "--shrink")
    return {
        "training step": "the devices that train are busy: more train workers, or faster ones",
        "augmentation": f"raise resources.augment_actors, or make images smaller once with `{shrink}`",
        "network": f"take a plan.gpu_node whose link carries more than {plan.gpu.gbit:g} Gbit/s",
        "S3 latency": f"raise data.fetch_concurrency, or pack images into Parquet with `{command('pack')}`",
        "object store": "raise resources.cpus_per_augment_actor: fewer actors hold fewer blocks",
    }[bottleneck]
