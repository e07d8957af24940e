"""YAML as configs are read and written. Knows nothing of settings."""

import re
from typing import Any

import yaml

from dinoray.models.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, `on` and `no` are text, and keys are text, each given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in set(keys):
            if keys.count(key) > 1:
                problem = f"key {key!r} is given {keys.count(key)} times"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):  # config.yaml would hold another key: JSON has text alone
                problem = f"key {key!r} is not text, put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return mapping

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\ud800": it could not be written to config.yaml
            raise yaml.constructor.ConstructorError(
                None, None, "text is not Unicode", node.start_mark
            ) from error
        return value


class Dumper(yaml.SafeDumper):
    """Quotes text that `Loader`, or any other reader of YAML, would take for something else."""


for _class in (Loader, Dumper):
    # YAML 1.1 wants a dot in the mantissa and a sign in the exponent, else it is text.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
for _letter in "yYnNoO":  # YAML 1.1 takes yes, no, on and off for booleans
    Loader.yaml_implicit_resolvers[_letter] = [
        (tag, pattern)
        for tag, pattern in Loader.yaml_implicit_resolvers[_letter]
        if not tag.endswith(":bool")
    ]


def read_mapping(data: bytes, what: str) -> dict[str, Any]:
    """The mapping in a YAML text; ConfigError, which begins with `what`, when it is none."""
    try:
        tree = yaml.load(data.decode(), Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not YAML: it is not UTF-8 text; save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{what} is not YAML: {yaml_problem(error)}; fix this line") from error
    if not isinstance(tree or {}, dict):
        raise ConfigError(
            f"{what} must hold a mapping of sections, not a {type(tree).__name__}; write `section:` and below it, "
            "indented, `key: value`"
        )
    return tree or {}


def yaml_problem(error: Exception) -> str:
    """What is wrong with a YAML text, and where, on one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split()) or type(error).__name__
    mark = error.problem_mark
    return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
