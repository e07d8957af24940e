"""Dotted keys of a config: which exist, which is the nearest to a wrong one, what is wrong with a value.

Stands between pydantic's errors and a person: each mistake becomes one line with key, value, rule and remedy.
Knows models and plain trees of values; not which config, file or recipe they come from.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dinoray.models.config import argument_hint
from dinoray.models.errors import redact_credentials
from dinoray.models.settings import flatten

Config = TypeVar("Config", bound=BaseModel)

EXAMPLES = {"data.path": "s3://bucket/train"}
"""A value for settings that must be given."""
REPLACED = {"data.fetch_attempts": "storage.give_up_after_seconds"}
"""Settings of earlier versions -> those that have taken their place. A file may still hold them; they do nothing."""
RENAMED = {"init.path": "init.from"}
"""Settings of earlier versions -> their names now. Files and command lines may still have the former."""
_RULES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    # Of the text fields only a run's name, which becomes a folder's, has a pattern.
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', beginning with a letter or digit",
    "string_type": "must be text: quote it",
    "tuple_type": "must be a list",
}
"""What pydantic's words for these errors leave unclear to somebody who writes YAML."""


_LEAST_LIKENESS, _LEAST_RATIO = 0.55, 0.7
"""Of names, and of words in them, that are proposed for a wrong one."""

_SECRET_ENDINGS = ("SECRET", "TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "KEY", "CREDENTIAL", "CREDENTIALS")
_SECRET_WORDS = ("PASS", "PWD")


def looks_secret(name: str) -> bool:
    """Whether a variable or setting of this name may hold what nobody else should see."""
    leaf = name.rpartition(".")[2].upper()
    return leaf.startswith(("AWS_SECRET", "AWS_ACCESS", "AWS_SESSION")) or any(
        word.endswith(_SECRET_ENDINGS) or word in _SECRET_WORDS for word in leaf.split("_")
    )


def leaf_fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key that can be set, in the order of declaration: `section.key`, or `key` outside of a section."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            leaves |= leaf_fields(field.annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + (field.alias or name)] = field
    return leaves


def explain(
    error: ValidationError, model: type[BaseModel], tree: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """One line per mistake in `tree`, which `model` refused. The members of a list or union are one mistake.

    `defaults`: values of keys that are left out, where those are not the model's own.
    """
    fields = leaf_fields(model)
    rules: dict[str, list[str]] = {}
    for found in error.errors():
        path = [str(part) for part in found["loc"]]
        key = next((k for k in (".".join(path[:1]), ".".join(path[:2])) if k in fields), ".".join(path))
        if found["type"] == "extra_forbidden":
            unknown = found["input"] if isinstance(found["input"], Mapping) else {}
            for name, value in flatten(unknown, f"{key}.") if unknown else [(key, found["input"])]:
                shown = "..." if looks_secret(name) else redact_credentials(repr(value))
                rules[f"{name}={shown}"] = [f"unknown key{_instead(name, shown, fields)}"]
        elif found["type"] == "missing":
            rules[key] = [f"must be set, e.g. {key}={EXAMPLES.get(key, '...')}"]
        elif found["type"] == "value_error":
            # Our own validators name the values that they are about.
            text = found["msg"].removeprefix("Value error, ")
            rules.setdefault("" if text.startswith(key) else key, []).append(text)
        elif found["type"] == "model_type" and key not in fields:
            value = redact_credentials(repr(found["input"]))
            rules[f"{key}={value}"] = [
                f"must be a section, with its keys in it{_in_section(key, value, fields)}"
            ]
        else:
            inside = len(path) > key.count(".") + 1 and isinstance(found["loc"][-1], int)
            rule = ("each item " if inside else "") + _rule(found["type"], found["msg"])
            if found["type"] == "string_type" and isinstance(found["input"], (Mapping, list)):
                rule = f"must be one text: write {key}=TEXT"  # quotes make no text of several values
            of_key = rules.setdefault(f"{key}={redact_credentials(repr(_at(tree, key)))}", [])
            # A list whose items were refused counts as too short as well.
            if rule not in of_key and not (of_key and found["type"] == "too_short"):
                of_key.append(rule)
    whole = rules.pop("", [])
    return [*whole, *(_line(head, texts, fields, defaults) for head, texts in rules.items())]


def keep_detected(new: Config, kept: BaseModel) -> Config:
    """`new`, where what is to be detected of the images (auto in `data` and `eval`) is as `kept` has it."""
    changes = {}
    for section in ("data", "eval"):
        asked, begun = getattr(new, section), getattr(kept, section)
        values = {
            name: getattr(begun, name) for name in type(asked).model_fields if getattr(asked, name) == "auto"
        }
        changes[section] = asked.model_copy(update=values)
    return new.model_copy(update=changes)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean a or b?`: up to three of `known`, most like `word` in letters or in parts; empty if none is."""
    section, _, leaf = word.rpartition(".")
    likeness = {}
    for key in known:
        key_section, _, key_leaf = key.rpartition(".")
        if _likeness(leaf, key_leaf, least=_LEAST_RATIO) >= _LEAST_LIKENESS:
            of_section = 0.2 * _alike(section, key_section) if section else 0.0
            likeness[key] = _likeness(leaf, key_leaf) + of_section
    best = max(likeness.values(), default=0.0)
    near = sorted((k for k, v in likeness.items() if v >= best - 0.15), key=lambda k: -likeness[k])
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def _instead(name: str, value: str, known: Iterable[str]) -> str:
    """What to write in place of a key that there is not."""
    section, _, leaf = name.rpartition(".")
    if name in REPLACED:
        return f"; set {REPLACED[name]} instead"
    if section == "backbone":
        return did_you_mean(name, [key for key in known if key.startswith("backbone.")]) or argument_hint(
            leaf, value
        )
    return did_you_mean(name, known) or "; --print-config shows all keys"


def _in_section(section: str, value: str, known: Iterable[str]) -> str:
    """What to write where a section itself was given a value."""
    keys = [key for key in known if key.startswith(f"{section}.")]
    main = next((key for key in keys if key.rpartition(".")[2] in ("path", "name", "from")), None)
    if main and value[0] in "'\"":
        return f"; did you mean {main}={value[1:-1]}?"
    return f": {', '.join(keys[:3])}, ..."


def _likeness(leaf: str, key_leaf: str, *, least: float = 0.0) -> float:
    """0 to 1 for two names: as a whole, or by their words in any order. Words less alike than `least` count as 0."""
    words, parts = leaf.split("_"), key_leaf.split("_")
    by_parts = fmean(
        (
            fmean(max(_alike(word, part, least) for part in parts) for word in words),
            fmean(max(_alike(word, part, least) for word in words) for part in parts),
        )
    )
    return max(_alike(leaf, key_leaf, least), by_parts)


def _alike(a: str, b: str, least: float = 0.0) -> float:
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    is_longer_form = (a.startswith(b) or b.startswith(a)) and ratio > 0.6
    return ratio if ratio >= least or is_longer_form else 0.0


def _rule(kind: str, message: str) -> str:
    return _RULES.get(kind) or re.sub(r"^\w+ should ", "must ", message).replace(" after validation", "")


def _line(head: str, rules: list[str], fields: Mapping[str, FieldInfo], defaults: Mapping[str, Any]) -> str:
    key = head.partition("=")[0]
    field = fields.get(key)
    text = " or ".join(rules).replace(" or must be ", " or ")
    line = f"{head}: {text}" if head else text  # what is wrong with the whole names its keys itself
    if field is None or field.is_required():
        return line
    known = dict(flatten(defaults))
    default = known[key] if key in known else field.get_default(call_default_factory=True)
    # A table is too long to be told.
    return line if isinstance(default, Mapping) else f"{line} (default {json.dumps(default)})"


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
