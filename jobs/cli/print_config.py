"""What --print-config prints: each setting with its description and where its value comes from.

The output is a config file: `--config FILE` reads the same settings back. Settings that must be given and are not
stand there as comments.
"""

import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dinoray.jobs.cli.arguments import overrides_of, pretrain_config
from dinoray.jobs.cli.config import apply_overrides, apply_tree, read_file, resolve, validate_as
from dinoray.jobs.cli.keys import EXAMPLES, leaf_fields
from dinoray.jobs.cli.recipes import backbone_of_start, starting_point
from dinoray.models.settings import flatten
from dinoray.pipeline.storage.yaml_text import Dumper
from dinoray.pipeline.worker.config import Config

_WIDTH = 110

Layers = Sequence[tuple[str, Mapping[str, Any]]]
"""(source, what it gives), the first in force."""


def describe_config(
    model: type[Config],
    arguments: Namespace,
    *,
    name_suffix: str = "",
    notes: Sequence[str] = (),
    **options: Any,
) -> str:
    """The config that a parsed command line asks for, as commented YAML. ConfigError for what is wrong in it.

    Settings that must be given may be missing. `notes` are comments at the top, `options` those of `resolve`.
    """
    tree, layers = _layers(arguments, name_suffix, options)
    named = {"data.path"} if tree.get("data", {}).get("mix") else set()  # by its sources
    missing = [
        key
        for key, field in leaf_fields(model).items()
        if field.is_required() and not _has(tree, key) and key not in named
    ]
    examples = {key: EXAMPLES.get(key, "...") for key in missing}
    complete: dict[str, Any] = {"data": {}, **tree}
    apply_tree(complete, examples)
    config = validate_as(model, complete)
    lines = ["# Every setting, followed by the source of its value. `--config FILE` reads this file back."]
    lines += [line for note in notes for line in _comment(note, "")]
    return "\n".join([*lines, *_section(config, layers, tree, examples, "")]) + "\n"


def _layers(
    arguments: Namespace, name_suffix: str, options: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Layers]:
    """What is configured, not validated, and the layers that it comes from."""
    overrides = overrides_of(arguments)
    given = ("command line", apply_overrides({}, overrides))
    if getattr(arguments, "from_study", None) is not None:
        tree = pretrain_config(arguments).model_dump(mode="json")
        return tree, [given, (f"study {arguments.from_study}", tree)]
    tree = resolve(arguments.recipe, arguments.config, overrides, name_suffix=name_suffix, **options)
    recipe = tree["recipe"]
    layers: list[tuple[str, Mapping[str, Any]]] = [given]
    if arguments.recipe:
        layers.append(("command line", {"recipe": recipe}))
    file = read_file(arguments.config, "--config") if arguments.config else {}
    if file:
        layers.append((f"file {arguments.config}", file))
    asked = apply_overrides(file, overrides)
    if name := backbone_of_start(recipe, asked):
        layers.append(("init.from", {"backbone": {"name": name}}))
    start = starting_point(recipe, asked, options.get("chosen"))
    return tree, [*layers, (f"recipe {recipe}", {"name": recipe, **start})]


def _section(
    config: BaseModel, layers: Layers, tree: Mapping[str, Any], missing: Mapping[str, Any], prefix: str
) -> list[str]:
    """Lines of a section and of those in it, without its name."""
    lines: list[str] = []
    values = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value, indent = getattr(config, name), "  " * prefix.count(".")
        if isinstance(value, BaseModel) and isinstance(field.annotation, type):
            lines += ["", *_comment(_summary(type(value)), indent), f"{indent}{name}:"]
            lines += _section(value, layers, tree, missing, f"{prefix}{name}.")
            continue
        name = field.alias or name
        key = prefix + name
        lines += _comment(_described(field), indent)
        if key in missing:
            lines.append(f"{indent}# {name}: {missing[key]}  # must be set, e.g. {key}={missing[key]}")
            continue
        source = _source(key, layers) if _has(tree, key) else "default"
        first, *rest = _value(values[name])
        lines += [
            f"{indent}{name}:{first}  # {' '.join(source.split())}",
            *(f"{indent}  {line}" for line in rest),
        ]
    return lines


def _described(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _summary(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _comment(text: str, indent: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in wrapped]


def _value(value: Any) -> list[str]:
    """YAML of a value: what follows its key on the same line, then the lines below it."""
    if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
        return ["", *(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items())]
    return [f" {_flow(value)}"]


def _flow(value: Any) -> str:
    """YAML of a value on one line."""
    options: dict[str, Any] = {
        "Dumper": Dumper,
        "default_flow_style": True,
        "width": float("inf"),
        "sort_keys": False,
    }
    text = str(yaml.dump(value, **options)).removesuffix("\n...\n").rstrip("\n")
    return text if "\n" not in text else str(yaml.dump(value, default_style='"', **options)).rstrip("\n")


def _has(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _source(key: str, layers: Layers) -> str:
    for source, layer in layers:
        for given, _ in flatten(layer):
            if given == key or given.startswith(f"{key}.") or key.startswith(f"{given}."):
                return source
    return "default"
