"""The config of a run as its command line makes it."""

from dinoray.jobs.cli.config import load_config
from dinoray.pipeline.worker.config import Config


def config_of(*overrides: str, recipe: str = "vit_small_imagenet_vanilla") -> Config:
    return load_config(recipe, None, ["data.path=/data", *overrides])
