"""The config of a study as its command line makes it, and how many images it is for."""

from dinoray.jobs.cli.config import load
from dinoray.jobs.studies.config import StudyConfig

NUM_IMAGES = 2160


def study(*overrides: str, recipe: str = "demo") -> StudyConfig:
    return load(StudyConfig, recipe, None, overrides, name_suffix="-study")
