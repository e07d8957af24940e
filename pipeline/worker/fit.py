"""Have Ray Train start the workers of a run, from the driver, until the run is at its end or stopped."""

from functools import partial
from math import ceil

import ray
import ray.train.torch
from ray.train import CheckpointConfig as RayCheckpointConfig
from ray.train import FailureConfig, RunConfig, ScalingConfig

from dinoray.pipeline.cluster.channel import NEWEST_CHECKPOINT
from dinoray.pipeline.cluster.lost_ray import post_loss, save_elsewhere
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.data.partition import dividing_workers
from dinoray.pipeline.ray_private.train_checkpoints import CAN_DROP, NEWEST_ALONE, drop_callbacks
from dinoray.pipeline.ray_private.train_controller import controller_callbacks
from dinoray.pipeline.ray_private.train_policies import Trainer
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import filesystem
from dinoray.pipeline.worker.ending import grow, take_restart
from dinoray.pipeline.worker.restoring import take_refusal
from dinoray.pipeline.worker.saving import drop_outdated
from dinoray.pipeline.worker.spec import WorkerSpec
from dinoray.pipeline.worker.worker import work

_GROW_SECONDS = 30.0
"""Time between two looks for room for more train workers; to start them anew takes about as long."""

_COLLECTIVE_SECONDS = 1800
"""Least time limit of collectives, Ray Train's own: in a study, other ranks wait in one for the decision on a step."""
_MARGIN_SECONDS = 120
"""After which collectives end by themselves, where a worker that hangs could not be ended."""

CONTROLLER = "train controller"
"""Name under which the run's channel keeps the handle of Ray Train's controller."""


def fit(spec: WorkerSpec, resources: ResourcesConfig, *, use_gpu: bool) -> None:
    """Run the training to its end; resume from the newest whole checkpoint that is committed, if the run has one."""
    if not CAN_DROP:
        spec.channel.post("note", text=NEWEST_ALONE)
    goes_on = True
    while goes_on:
        _fit_once(spec, resources, use_gpu=use_gpu)
        refusal = take_refusal(spec)
        if refusal is not None:
            spec.channel.post("note", text=f"warning: {refusal}")
        goes_on = refusal is not None or take_restart(spec.channel)
    drop_outdated(spec)
    spec.check_fence()
    run_dir.remove_leftovers(spec.run)  # all of them are past now


def _fit_once(spec: WorkerSpec, resources: ResourcesConfig, *, use_gpu: bool) -> None:
    guard = None if spec.fence is None else partial(spec.fence.check, is_strict=True)
    storage, path = filesystem(spec.run.uri, give_up_after_seconds=spec.give_up_after_seconds, guard=guard)
    least, most = resources.worker_range
    train = spec.config.train
    Trainer(
        work,
        sizes=dividing_workers(train.global_batch_size, train.accumulate_steps, least, most),
        grows=partial(grow, spec.channel),
        progress=partial(spec.channel.get, NEWEST_CHECKPOINT),
        # By reference: Ray's controller unpickles this dictionary, and would import all modules of the spec.
        train_loop_config={"spec": ray.put(spec)},
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),
            elastic_resize_monitor_interval_s=_GROW_SECONDS,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_train_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if use_gpu else "gloo",
            timeout_s=max(_COLLECTIVE_SECONDS, ceil(resources.hang_seconds) + _MARGIN_SECONDS),
        ),
        run_config=RunConfig(
            name=run_dir.CHECKPOINTS,
            storage_path=path,
            storage_filesystem=storage,
            checkpoint_config=RayCheckpointConfig(
                num_to_keep=None if CAN_DROP else spec.checkpoint.num_to_keep
            ),
            failure_config=FailureConfig(
                max_failures=resources.max_failures,
                # Each start of the workers that finds no room within a minute counts, too.
                controller_failure_limit=10 + ceil(resources.wait_for_nodes_minutes),
            ),
            callbacks=[
                *controller_callbacks(
                    started=partial(spec.channel.put, CONTROLLER),
                    lost=partial(post_loss, spec.channel),
                    taken_back=partial(save_elsewhere, spec.channel),
                ),
                *drop_callbacks(first=run_dir.META),
            ],
        ),
    ).fit()
