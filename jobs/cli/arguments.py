"""The command lines of jobs: options and `section.key=value` overrides in any order."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from dinoray.jobs.cli.config import load, load_kept
from dinoray.jobs.cli.recipes import RECIPE_NAMES
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.models.settings import Settings
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.trials import BEST, STUDY
from dinoray.pipeline.worker.config import Config


def positive(text: str) -> int:
    """Type of an option that is a whole number above 0."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


positive.__name__ = "positive number"  # as argparse names it in its error


def step(text: str) -> int | Literal["best", "last"]:
    """Type of the option that chooses a checkpoint."""
    return "best" if text == "best" else "last" if text == "last" else int(text)


class CommandLine(argparse.ArgumentParser):
    """Options and `section.key=value` overrides in any order; a wrong option ends like a wrong value."""

    def __init__(self, name: str | None = None, **options: Any) -> None:
        # As the user called it: the command `name` may be `dinoray NAME` or `python -m jobs.NAME`.
        prog = sys.argv[0] if sys.argv[0].startswith("dinoray ") else name and f"python -m jobs.{name}"
        super().__init__(prog=prog, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does, but options may stand before, between and after the overrides."""
        return self.parse_intermixed_args(args, namespace)

    def add_network(self, *, default: Literal["last", "best"] = "last") -> None:
        """Add the options that choose one network of a run; `default`: which checkpoint the help names as such."""
        self.add_argument(
            "--step",
            type=step,
            default=None,
            help=f"step of the checkpoint; best: by the run's evaluations; last: the newest (default: {default})",
        )
        self.add_argument(
            "--which",
            choices=("teacher", "student"),
            default="teacher",
            help="network to use (default: teacher)",
        )

    def add_recipe(self) -> None:
        """Add the options that settings start from."""
        self.add_argument(
            "--recipe",
            default=None,
            help="named set of settings to start from (default: demo; auto for pretrain with data.path)",
        )
        self.add_argument(
            "--config", type=Path, default=None, help="YAML file of settings that override the recipe"
        )

    def add_overrides(self, example: str) -> None:
        """Add the settings on the command line."""
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help=f"setting to change, e.g. {example}; `{command('pretrain')} --print-config` lists them",
        )

    def error(self, message: str) -> NoReturn:
        """ConfigError instead of argparse's own way out."""
        raise ConfigError(f"{message}; --help lists the options; settings are written as section.key=value")


class Arguments(CommandLine):
    """The command line that jobs with a config share."""

    def __init__(self, name: str, description: str, config: type[Config], *, resumes: bool = True) -> None:
        super().__init__(
            name,
            description=description,
            epilog=_settings_help(config),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_recipe()
        self.add_argument(
            "--print-config",
            action="store_true",
            help="print every setting with its description and source, and exit",
        )
        self.add_argument(
            "--json-schema", action="store_true", help="print the JSON Schema of the config and exit"
        )
        if resumes:
            self.add_argument(
                "--resume",
                action="store_true",
                help="resume the run of this name even if its settings have changed",
            )
        self.add_overrides("optim.base_lr=1e-3")


def one_source(overrides: Sequence[str], name: str) -> None:
    """ConfigError where `overrides` mix several sources: the command `name` takes one, as an argument."""
    if any(word.startswith("data.mix") for word in overrides):
        raise ConfigError(
            f"data.mix: {name} takes one source, which its argument names; leave data.mix out, and run "
            f"{name} once for each source, each with its own --out"
        )


_FIRST_SETTINGS = """\
  data.path=FOLDER_OR_S3        images; the names of subfolders are labels, used only for evaluation
  storage_path=FOLDER_OR_S3     folder of run directories (default: runs)
  name=NAME                     name of the run directory
  backbone.name=TIMM_NAME       network, by its name in timm
  train.epochs=N                passes over the images
  train.global_batch_size=N     images per step, over all GPUs
  resources.train_workers=N     training processes, one per GPU"""


def _settings_help(config: type[Config]) -> str:
    """The settings that most runs make, and the sections of all of them."""
    sections = [
        f"  {name:<12}{' '.join((field.annotation.__doc__ or '').split()).partition('. ')[0].rstrip('.')}"
        for name, field in config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
    ]
    return "\n".join(
        [
            "settings that most runs make:",
            _FIRST_SETTINGS,
            "",
            "sections of settings, set as section.key=value; --print-config describes every setting:",
            *sections,
            "",
            "recipes: " + ", ".join(RECIPE_NAMES),
        ]
    )


class PretrainArguments(Arguments):
    """The command line of jobs.pretrain."""

    def __init__(self) -> None:
        super().__init__("pretrain", "Pretrain a vision backbone with DINO.", Config)
        self.add_argument(
            "--init-from",
            metavar="PATH",
            default=None,
            help="weights to start from: timm:NAME, a file or a run; the same as init.from=PATH",
        )
        self.add_argument(
            "--from-study", metavar="DIR", default=None, help="start from the best config of the study in DIR"
        )
        self.add_argument(
            "--synthetic",
            action="store_true",
            help="only measure the training step, on crops made once on the device, and exit",
        )
        self.add_argument(
            "--no-train",
            action="store_true",
            help="only measure the stream of crops, without training, and exit; with --synthetic, name the bottleneck",
        )
        self.add_argument("--verbose", action="store_true", help="show Ray's own logs")


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The overrides of a command line, with those that options stand for."""
    init_from = getattr(arguments, "init_from", None)
    return [*arguments.overrides, *([f"init.from={init_from}"] if init_from else [])]


def pretrain_config(arguments: argparse.Namespace) -> Config:
    """The config that a parsed command line of jobs.pretrain asks for."""
    overrides = overrides_of(arguments)
    if arguments.from_study is None:
        return load(Config, arguments.recipe, arguments.config, overrides, looks=True)
    if arguments.recipe or arguments.config:
        raise ConfigError("--from-study sets the whole config; leave out --recipe and --config")
    study = Directory(arguments.from_study)
    if study.exists(STUDY) and not study.exists(BEST):
        raise ConfigError(
            f"--from-study={study.uri}: the study has no {BEST}, because it has not ended or has no best trial; "
            f"see its study.html, then run its `{command('tune')}` command again, or search another tune.space"
        )
    return load_kept(Config, study, overrides, name=BEST, what="finished study")
