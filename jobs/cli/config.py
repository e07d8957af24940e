"""How a config is resolved: recipe, then YAML file, then dotted overrides; strict; all errors at once.

Its sections meet in pipeline/worker/config.py. What becomes of a mistake stands in jobs/cli/keys.py.
"""

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dinoray.jobs.cli.auto_recipe import AUTO
from dinoray.jobs.cli.keys import RENAMED, REPLACED, did_you_mean, explain, keep_detected, leaf_fields
from dinoray.jobs.cli.recipes import RECIPE_NAMES, RECIPES, has_images, starting_point
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.storage.yaml_text import Loader, read_mapping, yaml_problem
from dinoray.pipeline.worker.config import MUTABLE_KEYS, MUTABLE_ON_RESUME, Config

AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(recipe: str | None, file: Path | None, overrides: Sequence[str]) -> Config:
    """The config of a run; see `load`."""
    return load(Config, recipe, file, overrides)


def load(
    model: type[AnyConfig],
    recipe: str | None,
    file: Path | None,
    overrides: Sequence[str],
    *,
    name_suffix: str = "",
    looks: bool = False,
    chosen: Mapping[str, Any] | None = None,
    default: str = AUTO,
) -> AnyConfig:
    """Resolve recipe, file and overrides into one validated config. ConfigError holds one line per mistake.

    `looks`, `chosen`, `default`: as in `resolve`.
    """
    options: dict[str, Any] = {"looks": looks, "chosen": chosen, "default": default}
    tree = resolve(recipe, file, overrides, name_suffix=name_suffix, **options)
    is_plain = tree["recipe"] in RECIPES
    return validate_as(model, tree, defaults=RECIPES[tree["recipe"]]() if is_plain else chosen)


def resolve(
    recipe: str | None,
    file: Path | None,
    overrides: Sequence[str],
    *,
    name_suffix: str = "",
    looks: bool = False,
    chosen: Mapping[str, Any] | None = None,
    default: str = AUTO,
) -> dict[str, Any]:
    """The tree of recipe, file and overrides, not validated.

    The recipe is the one given, else the one that the overrides or the file name, else the demo's. `looks`: the caller
    looks at the images, so that for own images `default` takes the demo's place; `chosen` is what auto then chose.
    Until then the choices for typical images stand in; ConfigError where they would be taken for the real ones.
    """
    tree = apply_overrides(read_file(file, "--config") if file else {}, overrides)
    otherwise = default if looks and has_images(tree) else "demo"
    name = tree.pop("recipe", otherwise) if recipe is None else recipe
    tree.pop("recipe", None)
    if not isinstance(name, str) or name not in RECIPE_NAMES:
        near = did_you_mean(str(name), RECIPE_NAMES)
        raise ConfigError(f"recipe={name!r} must be one of {', '.join(RECIPE_NAMES)}{near}")
    start = starting_point(name, tree, chosen)
    if name == AUTO and start and chosen is None and not looks:
        written = command("pretrain", "data.path=IMAGES", "--print-config")
        raise ConfigError(
            f"recipe={AUTO} looks at the images, which of the commands with recipes pretrain alone does; name another "
            f"recipe, or write what it chooses to a file, `{written} > auto.yaml`, and pass --config auto.yaml"
        )
    merged: dict[str, Any] = {"name": name + name_suffix, **start, "recipe": name}
    _merge(merged, tree)
    return merged


def apply_tree(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put values by dotted key into a tree, in place."""
    for key, value in values.items():
        *sections, leaf = key.split(".")
        parent = tree
        for section in sections:
            parent = parent[section]
        parent[leaf] = copy.deepcopy(value)  # not merged: a mapping replaces what was there


def load_run_config(run: Directory, overrides: Sequence[str] = ()) -> Config:
    """The config that a run directory keeps; see `load_kept`."""
    return load_kept(Config, run, overrides)


def load_kept(
    model: type[AnyConfig],
    directory: Directory,
    overrides: Sequence[str] = (),
    *,
    name: str = run_dir.CONFIG,
    what: str = "run",
) -> AnyConfig:
    """The config that a directory keeps, with overrides; ConfigError says which of the two is wrong."""
    file = directory.join(name)
    try:
        tree = _without_replaced(read_mapping(directory.read(name), file))
    except MissingObject as error:
        why = f"it has no {name}" if directory.list() else "nothing is there"
        raise ConfigError(
            f"{directory.uri} is not a {what} directory: {why}; give the directory that the {what} printed"
        ) from error
    try:
        config = validate_as(model, tree)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from error
    return validate_as(model, apply_overrides(tree, overrides), defaults=tree) if overrides else config


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with `section.key=value` overrides merged in; not validated.

    Values are read as YAML, but for text: it stands for itself, whatever YAML makes of `on` or `2024`.
    ConfigError holds one line per override that cannot be read.
    """
    merged: dict[str, Any] = {}
    _merge(merged, tree)
    mistakes = []
    for override in overrides:
        key, separator, text = override.partition("=")
        key = RENAMED.get(key, key)
        path = key.split(".")
        if not separator or not all(path):
            mistakes.append(
                f"override {override!r} must look like section.key=value, e.g. optim.base_lr=1e-3"
            )
            continue
        try:
            _merge(merged, _nest(path, _read_value(key, text)))
        except (yaml.YAMLError, RecursionError) as error:
            mistakes.append(
                f"override {override!r}: the value is not YAML: {yaml_problem(error)}; mend it, and quote the whole "
                f"for the shell: '{key}=...'"
            )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return merged


def validate(tree: Mapping[str, Any]) -> Config:
    """The config of a run; see `validate_as`."""
    return validate_as(Config, tree)


def validate_as(
    model: type[AnyConfig], tree: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None
) -> AnyConfig:
    """Build the config from a tree of plain values. ConfigError holds one line per mistake, all of them.

    `defaults`: values that keys have if they are left out, where those are not the model's.
    """
    tree = {"data": {}, **tree}  # so that its missing keys are named, not the section
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, model, tree, defaults or {}))) from error


def differences(old: Config, new: Config, *, free: Collection[str] = ()) -> list[str]:
    """Settings that decide what is learnt and differ, as `key: old -> new`; dotted `free` ones may differ too.

    What is to be detected stays as it is kept.
    """
    a, b = (
        {
            k: v
            for k, v in flatten(config.model_dump(mode="json", exclude=set(MUTABLE_ON_RESUME)))
            if k not in free and k not in MUTABLE_KEYS
        }
        for config in (old, keep_detected(new, old))
    )
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def read_file(file: Path, option: str) -> dict[str, Any]:
    """The mapping in the YAML file that `option` names; ConfigError when it cannot be read or is none."""
    try:
        return _without_replaced(read_mapping(file.read_bytes(), f"{option} {file}"))
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror}; check the path") from error


def json_schema(model: type[Config] = Config) -> str:
    """JSON Schema of the config file, for editors. No key is required: a recipe has what the file leaves out."""
    schema = model.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    schema["properties"]["recipe"]["enum"] = list(RECIPE_NAMES)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1)


_FIELDS = leaf_fields(Config)


def _without_replaced(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a file without settings that earlier versions had, and with others under their names now."""
    for key in (*REPLACED, *RENAMED):
        section, _, leaf = key.rpartition(".")
        if isinstance(tree.get(section), dict) and leaf in tree[section]:
            value, now = tree[section].pop(leaf), RENAMED.get(key, "").rpartition(".")[2]
            if now and tree[section].get(now) is None:
                tree[section][now] = value
    return tree


def _read_value(key: str, text: str) -> Any:
    kind = _FIELDS[key].annotation if key in _FIELDS else None
    if kind is str or (kind == str | None and text not in ("", "null", "~")):
        return text
    if kind == tuple[str, ...] and not text.startswith("["):
        return [text]  # a pattern may begin with what YAML takes for its own
    return yaml.load(text, Loader)


def _nest(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nest(path[1:], value)}


def _merge(into: dict[str, Any], tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
