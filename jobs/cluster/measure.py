"""A plan's config, and the figures that it is made from: given ones, and for the others short measurements.

They are taken in this process, or, in a job on a cluster, by tasks on its nodes: the head has no CPUs to measure.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ray
import torch

from dinoray.jobs.cli.main import is_local, join_ray
from dinoray.jobs.cluster.plan_config import OF_IMAGES, PlanConfig, trains_on_gpus
from dinoray.jobs.runs.data_lines import data_lines
from dinoray.jobs.studies.config import schedule_of
from dinoray.models.commands import command, command_words
from dinoray.models.errors import DataError, ResourceError
from dinoray.pipeline.augment.config import CropsConfig, crop_bytes
from dinoray.pipeline.cluster.channel import known_error
from dinoray.pipeline.cluster.lost_ray import leave_ray
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.partition import batch_size_per_worker
from dinoray.pipeline.data.reading.reads import count_reads
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.labels import HELD_OUT_SHARE
from dinoray.pipeline.planning.calibrate import (
    gradient_bytes,
    measure_crops,
    measure_latency,
    measure_step,
)
from dinoray.pipeline.planning.node_rates import Figures, Run
from dinoray.pipeline.planning.prices import PlanSettings
from dinoray.pipeline.worker.cadence import Cadence

Say = Callable[[str], None]

_TASK_CPUS = 8
"""CPUs of the task that measures crops on a cluster."""


class Measured(NamedTuple):
    """The figures, where each comes from, and whether they are for GPUs."""

    figures: Figures
    num_images: int
    on_gpus: bool
    sources: dict[str, str]
    has_labels: bool = False
    """Of images that were looked at."""


def measure(config: PlanConfig, say: Say, *, verbose: bool) -> Measured:
    """The figures of a plan; `say` tells what is being measured. ResourceError where that takes a GPU."""
    plan, on_gpus = config.plan, trains_on_gpus(config)
    trained_on = plan.images_per_second_per_gpu
    if on_gpus and trained_on is None and is_local() and not torch.cuda.is_available():
        raise ResourceError(
            "plan.images_per_second_per_gpu: not set, and this machine has no GPU to measure it; "
            f"set it, or measure on a GPU node: {command('submit', '--', *command_words('plan', '...'))}"
        )
    known = {name: getattr(plan, name) for name in PlanSettings.model_fields if name in Figures._fields}
    known["num_images"] = plan.num_images
    sources = {name: "given" for name, value in known.items() if value is not None}
    missing = [f"plan.{name}" for name in OF_IMAGES if known[name] is None]
    if not missing and known["images_per_request"] is None:
        known["images_per_request"], sources["images_per_request"] = 1.0, "as for objects"
    has_labels = False
    joined = not is_local() and (known["images_per_second_per_cpu"] is None or trained_on is None)
    if joined:
        join_ray(1, verbose=verbose)
    try:
        if missing:
            try:
                has_labels = _look_at_images(config, known, sources, say)
            except DataError as error:
                if len(missing) == len(OF_IMAGES):
                    raise
                why = known_error(error)  # which another node may have told of
                instead = f"or also set {', '.join(missing)}, so that no images need to be read"
                raise DataError(f"{why}; {instead}") from error
        if trained_on is None:
            say(f"measuring the training step for {plan.seconds:g} s")
            known["images_per_second_per_gpu"], sources["images_per_second_per_gpu"] = _train(
                config, known["num_images"], on_gpus=on_gpus, say=say
            )
    finally:
        if joined:
            leave_ray()
    num_images = known.pop("num_images")
    return Measured(Figures(**known), num_images, on_gpus, sources, has_labels)


def _look_at_images(config: PlanConfig, known: dict[str, Any], sources: dict[str, str], say: Say) -> bool:
    """Put what is not given of the images into `known`; return whether they have labels."""
    plan = config.plan

    def note(name: str, value: float, source: str) -> None:
        if known[name] is None:
            known[name], sources[name] = value, source

    say(f"listing {config.data.path}")
    manifest = build_manifest(config.data, config.storage)
    source = Source(config.data, manifest, config.storage)
    for line in data_lines(source):
        say(line)
    order = source.order(config.train.seed)
    reads = count_reads(
        manifest,
        order,
        train_workers=config.resources.most_workers,
        global_batch_size=config.train.global_batch_size,
        image_bytes=crop_bytes(config.crops),
        most_actors=config.resources.actor_range[1] or 1,
        cpus_per_actor=config.resources.cpus_per_augment_actor,
        num_streams=config.data.streams,
    )
    again = f"; each row group is read {reads.times_read:.1f} times" if reads.times_read > 1.05 else ""
    note("num_images", manifest.num_images, "listed")
    note("bytes_per_image", reads.bytes_per_image, f"listed{again}")
    note("images_per_request", reads.images_per_request, "listed")
    if known["latency_ms"] is None:
        note("latency_ms", measure_latency(source), "measured from here")
    if known["images_per_second_per_cpu"] is None:
        say(f"measuring crops for {plan.seconds:g} s")
        options: dict[str, Any] = {"seed": config.train.seed, "seconds": plan.seconds}
        if is_local():
            cropped = measure_crops(source, order, config.crops, **options)
        else:
            # No more than a node has, if any node is up; else one comes for it.
            up = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
            cpus = min(_TASK_CPUS, up or plan.cpu.cpus)
            task = ray.remote(num_cpus=cpus)(measure_crops)
            cropped = ray.get(task.remote(source, order, config.crops, **options, threads=cpus))
        stages = " + ".join(f"{stage} {ms:.2f}" for stage, ms in cropped.cpu_ms.items())
        where = f"measured on {cropped.threads} CPUs with {cropped.images:,} images: {stages} ms"
        note("images_per_second_per_cpu", cropped.images_per_second_per_cpu, where)
    return source.has_labels


def _train(config: PlanConfig, num_images: int, *, on_gpus: bool, say: Say) -> tuple[float, str]:
    batch = batch_size_per_worker(config.train.global_batch_size, config.resources.most_workers)
    options: dict[str, Any] = {"num_images": num_images, "batch_size": batch, "seconds": config.plan.seconds}
    if is_local():
        trained = measure_step(config.algorithm(), **options, on_gpu=on_gpus)
    else:
        if not ray.cluster_resources().get("GPU"):
            say("no GPU node is up: waiting for one to join")
        task = ray.remote(num_cpus=1, num_gpus=1)(measure_step)
        trained = ray.get(task.remote(config.algorithm(), **options, on_gpu=True))
    where = f"measured on {trained.device}: median of {trained.steps} steps of {batch} images"
    return trained.images_per_second, where


def run_of(config: PlanConfig, measured: Measured) -> Run:
    """The run in numbers."""
    num_images, resources = measured.num_images, config.resources
    steps = schedule_of(config, num_images=num_images).total_steps
    every = config.eval.every_steps
    cadence = Cadence.of(
        steps,
        log=config.log,
        evaluation=config.eval,
        checkpoint=config.checkpoint,
        is_scored=measured.has_labels or config.eval.label_free,
    )
    evaluations = 1 + -(-steps // every)  # one of them before the first step
    return Run(
        total_steps=steps,
        global_batch_size=config.train.global_batch_size,
        train_workers=resources.most_workers,
        crop_bytes=crop_bytes(config.crops),
        gradient_bytes=gradient_bytes(config.algorithm(), num_images=num_images),
        forwards_per_image=forwards_per_image(config.crops),
        evaluations=evaluations,
        pausing_evaluations=1 if config.eval.where == "side" else evaluations,
        images_per_evaluation=_images_per_evaluation(config, num_images, has_labels=measured.has_labels),
        checkpoints=cadence.num_saves,
        checkpoint=config.checkpoint,
        prefetch_batches=resources.prefetch_batches,
        cpus_per_train_worker=resources.cpus_per_train_worker,
        cpus_per_augment_actor=resources.cpus_per_augment_actor,
        most_actors=resources.actor_range[1],
        fetch_concurrency=config.data.fetch_concurrency,
    )


def forwards_per_image(crops: CropsConfig) -> float:
    """Forwards of one image at the global size that take as long as a step does for an image.

    The teacher sees the global crops, the student all, whose backward takes as long as two forwards.
    """
    local = (crops.local_crop_size / crops.global_crop_size) ** 2
    return crops.num_global_crops + 3 * (crops.num_global_crops + crops.num_local_crops * local)


def _images_per_evaluation(config: PlanConfig, num_images: int, *, has_labels: bool) -> int:
    """At most so many are embedded; how many labelled ones there are is not looked at."""
    found, labelled = 0, True
    if config.eval.val_path == AUTO and has_labels:
        val = min(round(HELD_OUT_SHARE * num_images), config.eval.max_val_images)
        found = min(num_images, val + config.eval.max_train_images)
    elif config.eval.val_path not in (None, AUTO):
        found = min(num_images, config.eval.max_train_images) + config.eval.max_val_images
    else:
        labelled, found = False, min(num_images, config.eval.max_val_images) if config.eval.label_free else 0
    from_weights = config.init.path is not None or config.backbone.pretrained
    lidar = config.eval.measures_lidar(labelled=labelled, from_weights=from_weights)
    return found + (config.probe.lidar_images * config.probe.lidar_views if lidar else 0)
