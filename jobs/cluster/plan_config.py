"""A plan's command line and its config."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from pydantic import model_validator

from dinoray.jobs.cli.arguments import Arguments
from dinoray.jobs.cli.config import load
from dinoray.jobs.cli.main import is_local
from dinoray.models.errors import ConfigError
from dinoray.pipeline.planning.prices import PlanSettings
from dinoray.pipeline.worker.config import Config

BUCKET = "s3://BUCKET/images"
"""Stands for `data.path` where a plan needs no images."""


OF_IMAGES = ("num_images", "bytes_per_image", "latency_ms", "images_per_second_per_cpu")


class PlanConfig(Config):
    """All settings of a run and of its plan."""

    plan: PlanSettings = PlanSettings()

    @model_validator(mode="before")
    @classmethod
    def _looks_at_no_images_if_all_is_given(cls, tree: dict[str, Any]) -> dict[str, Any]:
        data, plan = tree.get("data"), tree.get("plan")
        if not isinstance(data, dict) or not isinstance(plan, dict) or "path" in data or data.get("mix"):
            return tree
        missing = [f"plan.{name}" for name in OF_IMAGES if plan.get(name) is None]
        if missing and len(missing) < len(OF_IMAGES):
            raise ValueError(f"data.path: must be set, or else set {', '.join(missing)} too")
        return tree if missing else {**tree, "data": {**data, "path": BUCKET}}


class PlanArguments(Arguments):
    """The command line of jobs.plan."""

    def __init__(self) -> None:
        super().__init__(
            "plan",
            "Estimate the nodes, time and cost of a pretraining run.",
            PlanConfig,
            resumes=False,
        )
        self.add_argument(
            "--out", type=Path, metavar="FILE", help="write cluster.yaml with the nodes of the plan to FILE"
        )
        self.add_argument("--json", action="store_true", help="print the plan as JSON")
        self.add_argument("--verbose", action="store_true", help="show Ray's own logs")


def plan_config(arguments: Namespace) -> PlanConfig:
    """The config that a parsed command line asks for. ConfigError for what cannot be planned."""
    config = load(PlanConfig, arguments.recipe, arguments.config, arguments.overrides)
    given = config.plan.images_per_second_per_gpu
    if given is not None and config.resources.use_gpu is False:
        raise ConfigError(
            f"plan.images_per_second_per_gpu={given:g} is for GPUs, but resources.use_gpu=false trains on CPUs; "
            "leave out one of them"
        )
    if not is_local() and config.resources.use_gpu is False:
        raise ConfigError(
            "resources.use_gpu=false plans a run on one machine's CPUs, but this is a job on a cluster; "
            "plan it on that machine"
        )
    if arguments.out is not None and not trains_on_gpus(config):
        raise ConfigError(
            f"--out {arguments.out} is for a cluster, but this plan is for the CPUs of this machine; "
            "set plan.images_per_second_per_gpu, or leave out --out"
        )
    return config


def trains_on_gpus(config: PlanConfig) -> bool:
    """Whether the plan is of a cluster with GPU nodes; else of this machine, training on its CPUs."""
    if config.resources.use_gpu != "auto":
        return config.resources.use_gpu
    if config.plan.images_per_second_per_gpu is not None or not is_local():
        return True
    import torch  # takes seconds, which a plan of given figures need not wait for

    return torch.cuda.is_available()
