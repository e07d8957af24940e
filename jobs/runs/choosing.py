"""The recipe auto in a run: it looks and chooses once, before Ray starts; the choices are kept with the run.

A run that is resumed takes the kept choices, whatever has become of its images and devices.
"""

import contextlib
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinoray.jobs.cli.arguments import overrides_of
from dinoray.jobs.cli.auto_facts import Choice, Facts, choice_lines
from dinoray.jobs.cli.auto_recipe import AUTO, as_tree, choose
from dinoray.jobs.cli.config import apply_overrides, load, load_run_config, read_file
from dinoray.jobs.cli.recipes import RECIPE_NAMES, with_backbone_of_start
from dinoray.models.errors import ConfigError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.worker.config import Config


class Asked(NamedTuple):
    """The settings that a command line asks for, from which the config follows once the recipe has chosen."""

    recipe: str | None
    file: Path | None
    overrides: Sequence[str]

    @classmethod
    def of(cls, arguments: Namespace) -> "Asked | None":
        """Return that of a parsed command line of pretrain; None where a study sets the whole config."""
        if arguments.from_study is not None:
            return None
        return cls(arguments.recipe, arguments.config, overrides_of(arguments))

    def settings(self) -> dict[str, Any]:
        """Return the user's own settings as a tree."""
        return apply_overrides(read_file(self.file, "--config") if self.file else {}, self.overrides)

    def config(self, chosen: dict[str, Any] | None = None, *, default: str = AUTO) -> Config:
        """Return the config; `default`: the recipe where none is named, for own images."""
        return load(
            Config, self.recipe, self.file, self.overrides, looks=True, chosen=chosen, default=default
        )


class Chosen(NamedTuple):
    """What a run keeps: the facts that the recipe saw, and its choices."""

    facts: Facts
    choices: Sequence[Choice]

    @property
    def lines(self) -> list[str]:
        """Lines for a person: the facts, and each choice with its reason."""
        return [f"recipe {AUTO}: {self.facts.line}", *choice_lines(self.choices)]

    @property
    def tree(self) -> dict[str, Any]:
        """The choices as a tree of settings."""
        return as_tree(self.choices)


def is_to_choose(config: Config, run: Directory) -> bool:
    """Return True if the recipe is auto and the run has not begun."""
    return config.recipe == AUTO and not run.exists(run_dir.CONFIG)


def choose_for_run(config: Config, asked: Asked, run: Directory) -> Config:
    """Look at the images and devices, keep the choices in the run directory, and return the config with them.

    The images are listed whole; the manifest in the run directory is that of the run. Raises ConfigError for a single
    image, and what listing and reading raise.
    """
    from dinoray.jobs.runs.looking import look
    from dinoray.jobs.runs.run_size import check_more_than_one
    from dinoray.pipeline.data.manifests.manifest import load_or_build

    manifest = load_or_build(config.data, run, storage=config.storage)
    with listed_anew(run):
        check_more_than_one(config, manifest.num_images, manifest.ignored)
    chosen = choose_by(look(config, manifest), asked)
    kept = {"facts": chosen.facts._asdict(), "choices": [choice._asdict() for choice in chosen.choices]}
    run.write(run_dir.CHOICES, json.dumps(kept, indent=1).encode())
    return asked.config(chosen.tree)


@contextlib.contextmanager
def listed_anew(run: Directory) -> Iterator[None]:
    """Forget the listing of a run that is refused for its few images: the same command is to see those added."""
    try:
        yield
    except ConfigError:
        run.delete(run_dir.MANIFEST)
        raise


def choose_by(facts: Facts, asked: Asked) -> Chosen:
    """Choose what the command line leaves open."""
    return Chosen(facts, choose(facts, with_backbone_of_start(AUTO, asked.settings())))


def choose_briefly(config: Config, asked: Asked) -> Chosen:
    """Look at what can be listed in some seconds, and choose; nothing is kept."""
    from dinoray.jobs.runs.looking import look_briefly

    return choose_by(look_briefly(config), asked)


def as_begun(config: Config, asked: Asked | None, run: Directory) -> Config:
    """Return the config with the recipe that the run began with, where none is named, and with its choices."""
    if asked is None or config.recipe != AUTO:
        return config
    kept = load_run_config(run)
    if kept.recipe != AUTO:  # begun by a version that took another one where none is named
        return asked.config(default=kept.recipe) if kept.recipe in RECIPE_NAMES else config
    chosen = kept_choices(kept, run)
    # Without the file, all that the run has is what was chosen.
    return asked.config(chosen.tree if chosen else kept.model_dump(mode="json", exclude={"name", "recipe"}))


def kept_choices(config: Config, run: Directory) -> Chosen | None:
    """Return what the recipe has chosen for a run; None where it is another recipe."""
    if config.recipe != AUTO:
        return None
    try:
        kept = json.loads(run.read(run_dir.CHOICES))
    except MissingObject:
        return None
    return Chosen(Facts(**kept["facts"]), [Choice(**choice) for choice in kept["choices"]])
