"""The tree of configs: recipe, then YAML file, then dotted overrides; strict; all errors at once.

Each section is declared beside the thing that it configures; they meet here and nowhere else.
"""

import argparse
import copy
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from jobs.recipes import RECIPES
from models.settings import ConfigError
from pipeline.checkpoint import CheckpointConfig
from pipeline.features import EvalConfig
from pipeline.manifest import DataConfig
from pipeline.metrics import LogConfig
from pipeline.training import DINOConfig
from pipeline.worker import ResourcesConfig

FREE_SECTIONS = frozenset({"resources", "log", "checkpoint", "storage_path", "name", "recipe"})
"""What may differ when a run is continued: nothing in them changes what is learnt."""


class Config(DINOConfig):
    """A whole run."""

    recipe: str
    """The recipe that the other values started from."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run, and of its directory under `storage_path`; the same name continues the same run."""
    storage_path: str = Field(default="runs", min_length=1)
    """Folder or s3://bucket/prefix that holds run directories."""
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    resources: ResourcesConfig = ResourcesConfig()

    def algorithm(self) -> DINOConfig:
        """The part that defines what is learnt, without where and how it runs."""
        return DINOConfig.model_validate({k: getattr(self, k) for k in DINOConfig.model_fields})

    def to_yaml(self) -> str:
        """The resolved config, in the form that `--config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class Arguments(argparse.ArgumentParser):
    """The command line that jobs with a config share."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, epilog="recipes: " + ", ".join(RECIPES))
        self.add_argument("--recipe", default=None, help="named starting point (default: demo)")
        self.add_argument("--config", type=Path, default=None, help="YAML file with values to change")
        self.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
        self.add_argument(
            "--json-schema", action="store_true", help="print the JSON Schema of the config and exit"
        )
        self.add_argument(
            "--resume", action="store_true", help="continue the run of this name even with another config"
        )
        self.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.base_lr=1e-3")


def load_config(recipe: str | None, file: Path | None, overrides: Sequence[str]) -> Config:
    """Resolve recipe, file and overrides into one validated config. ConfigError holds one line per mistake."""
    tree = apply_overrides(_read_yaml(file) if file else {}, overrides)
    name = recipe or tree.get("recipe") or "demo"
    if name not in RECIPES:
        raise ConfigError(
            f"recipe={name!r} is unknown{_did_you_mean(str(name), RECIPES)}; one of {', '.join(RECIPES)}"
        )
    merged: dict[str, Any] = {"name": name, **RECIPES[name](), "recipe": name}
    tree.pop("recipe", None)
    _merge(merged, tree)
    return validate(merged)


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with `section.key=value` overrides merged in, values read as YAML; not validated."""
    merged: dict[str, Any] = {}
    _merge(merged, tree)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"override {override!r} must look like section.key=value")
        try:
            _merge(merged, _nest(key.split("."), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: value is not YAML ({_first_line(error)})") from error
    return merged


def validate(tree: Mapping[str, Any]) -> Config:
    """Build the config from a tree of plain values. ConfigError holds one line per mistake, all of them."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from error


def differences(old: Config, new: Config) -> list[str]:
    """Settings that decide what is learnt and differ, as `key: old -> new`."""
    a = {k: v for k, v in _leaves(old.model_dump(mode="json")) if k.split(".")[0] not in FREE_SECTIONS}
    b = {k: v for k, v in _leaves(new.model_dump(mode="json")) if k.split(".")[0] not in FREE_SECTIONS}
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def json_schema() -> str:
    """JSON Schema of the config file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=1)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is not YAML: {_first_line(error)}") from error
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"--config {file} must hold a mapping of sections, not a {type(tree).__name__}")
    return tree or {}


def _nest(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nest(path[1:], value)}


def _merge(into: dict[str, Any], tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"{key}={error['input']!r}: unknown key{_did_you_mean(key, _keys(Config))}"
    if error["type"] == "missing":
        return f"{key}: must be set, e.g. {key}={_EXAMPLES.get(key, '...')}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={error['input']!r}: {message}" if error["type"] != "value_error" else f"{key}: {message}"


_EXAMPLES = {"data.path": "s3://bucket/prefix"}


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _did_you_mean(word: str, candidates: Iterable[str]) -> str:
    known = list(candidates)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    leaf = word.rsplit(".", 1)[-1]
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
