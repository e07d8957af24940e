"""Every key of the config: the schema describes it, valid values land at it, garbage is a config or an error."""

import json
from typing import Any, Literal, get_args, get_origin

import annotated_types as at
import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo
from run_configs import config_of

from dinoray.jobs.cli.config import json_schema, load_config, validate
from dinoray.jobs.cli.keys import leaf_fields
from dinoray.jobs.cli.recipes import RECIPE_NAMES, RECIPES
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.worker.config import Config

FIELDS = leaf_fields(Config)


# What describes it


def test_the_schema_describes_every_key_in_its_own_words() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["recipe"]["enum"] == list(RECIPE_NAMES)
    sections = {"": schema} | {
        name: schema["$defs"][about["$ref"].rpartition("/")[2]]
        for name, about in schema["properties"].items()
        if "$ref" in about
    }
    assert {f"{s}.{key}".lstrip(".") for s in sections for key in sections[s]["properties"]} == {
        *FIELDS,
        *(section for section in sections if section),
    }
    for key, field in FIELDS.items():
        section, _, leaf = key.rpartition(".")
        assert sections[section]["properties"][leaf]["description"] == field.description
        assert field.description
        assert "\n" not in field.description
    assert all(section["description"] for section in sections.values())
    assert sections["optim"]["properties"]["base_lr"]["description"].startswith("Peak learning rate")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_schema_accepts_recipes_and_refuses_what_the_config_refuses(recipe: str) -> None:
    schema = jsonschema.Draft202012Validator(json.loads(json_schema()))
    assert schema.is_valid(RECIPES[recipe]())  # a part of a config, as files are
    assert schema.is_valid(yaml.safe_load(load_config(recipe, None, ["data.path=/data"]).to_yaml()))
    assert not schema.is_valid({"optim": {"lr": 1}})
    assert not schema.is_valid({"optim": {"base_lr": 0}})
    assert not schema.is_valid({"recipe": "none"})


# Anything at all

_ORDERED = st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1.0))
_SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True),
    "crops.num_global_crops": st.just(2),
    "crops.global_crop_scale": _ORDERED,
    "crops.local_crop_scale": _ORDERED,
    "crops.aspect_ratio": _ORDERED | st.tuples(_ORDERED, _ORDERED),
    "crops.blur_sigma": _ORDERED | st.tuples(_ORDERED, _ORDERED),
    **{
        f"crops.{name}": st.floats(0, 0.5) | st.tuples(st.floats(0, 0.5), st.floats(0, 0.5))
        for name in ("flip_prob", "jitter_prob", "brightness", "contrast", "saturation", "hue", "gray_prob")
    },
    "crops.local_blur_prob": st.floats(0, 1),
    "crops.local_solarize_prob": st.floats(0, 1),
    "crops.solarize_threshold": st.integers(0, 256) | st.tuples(st.integers(0, 256), st.integers(0, 256)),
    "crops.global_blur_prob": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "crops.global_solarize_prob": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "backbone.train": st.sampled_from(["all", "last_n(2)", "lora(4)"]),
    "data.channels": st.just(3),  # others need crops without hue
    "data.page": st.sampled_from([0, 7, "channels"]),
    "crops.channels": st.just(3),
    "data.value_range": st.sampled_from(["auto", None, (0.0, 4095.0), (-1.5, 2.0)]),
    "crops.pixel_mean": st.tuples(*[st.floats(0, 1)] * 3),
    "crops.pixel_std": st.tuples(*[st.floats(0.1, 1)] * 3),
    "checkpoint.every_minutes": st.none() | st.just("auto") | st.floats(0.1, 100),
    "eval.timeout_minutes": st.just("auto") | st.floats(0.1, 100),
    "eval.k": st.lists(st.integers(1, 99), min_size=1).map(tuple),
    "data.label_from_parent": st.booleans() | st.just("auto"),
    "data.label_level": st.integers(-3, 3) | st.from_regex(r"[a-z]{1,9}", fullmatch=True),
    **{
        f"data.{name}": st.lists(st.from_regex(r"[a-z*{}/]{1,9}", fullmatch=True)).map(tuple)
        for name in ("include", "exclude")
    },
    "eval.val_path": st.none() | st.from_regex(r"/[a-z]{1,9}", fullmatch=True),
    "head.out_dim": st.integers(2, 99) | st.just("auto"),
    "loss.teacher_temp": st.floats(0.01, 1) | st.just("auto"),
    "teacher.teacher_momentum": st.floats(0, 1) | st.just("auto"),
    "init.freeze_steps": st.integers(0, 99) | st.just("auto"),
    "init.from": st.none() | st.from_regex(r"/[a-z]{1,9}", fullmatch=True),
    "probe.linear_lrs": st.lists(st.floats(0.01, 1), min_size=1).map(tuple),
    "resources.use_gpu": st.booleans() | st.just("auto"),
    "resources.train_workers": st.integers(1, 9) | st.tuples(st.integers(1, 3), st.integers(3, 9)),
    "resources.augment_actors": st.integers(1, 9) | st.tuples(st.integers(1, 3), st.integers(3, 9)),
    "resources.max_failures": st.integers(-1, 9),
    # Of an evaluator that eval.where=train does not have.
    **{f"resources.evaluator_{kind}": st.just(0.0) for kind in ("cpus", "gpus")},
}


def values_of(key: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Valid values of a key, as its type and bounds say."""
    if key in _SPECIAL:
        return _SPECIAL[key]
    kind = field.annotation
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is str or kind == str | None:
        return st.from_regex(r"[a-z0-9_./-]{0,8}[a-z0-9]", fullmatch=True)
    low: Any = next(
        (m.ge if isinstance(m, at.Ge) else m.gt for m in field.metadata if isinstance(m, at.Ge | at.Gt)), 0
    )
    high: Any = next(
        (m.le if isinstance(m, at.Le) else m.lt for m in field.metadata if isinstance(m, at.Le | at.Lt)),
        low + 99,
    )
    if kind in (int, int | None):
        return st.integers(low, high)
    assert kind in (float, float | None), f"{key} needs an entry in _SPECIAL"
    return st.floats(low, high, exclude_min=True, exclude_max=True)


SETTABLE = [key for key in FIELDS if key not in ("recipe", "backbone.kwargs", "data.mix")]
"""`data.mix` takes the place of `data.path`."""


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_valid_value_lands_at_its_key_and_nowhere_else(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(SETTABLE))
    value = data.draw(values_of(key, FIELDS[key]))
    text = value if isinstance(value, str) else json.dumps(value)
    before, after = (dict(flatten(c.model_dump())) for c in (config_of(), config_of(f"{key}={text}")))
    assert after.pop(key) == value
    del before[key]
    assert after == before


def test_every_key_can_be_set() -> None:
    """So that the test above, which draws keys, cannot pass over one that never works."""
    for key in SETTABLE:
        value = before = dict(flatten(config_of().model_dump()))[key]
        text = value if isinstance(value, str) else json.dumps(value)
        assert dict(flatten(config_of(f"{key}={text}").model_dump()))[key] == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
GARBAGE = (
    st.text() | st.sampled_from(sorted(FIELDS)) | st.sampled_from(sorted(FIELDS)).map(lambda key: key + ".x")
)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(GARBAGE, st.text() | JSON.map(json.dumps) | st.text("[]{}:,#&*!|>'\"% \n-1a")), max_size=3
    )
)
@example([("backbone.kwargs.0", "?")])
@example([("backbone.kwargs", "{1: 2}")])
def test_garbage_is_a_config_or_a_config_error(garbage: list[tuple[str, str]]) -> None:
    try:
        config = load_config("demo", None, [f"{key}={text}" for key, text in garbage])
    except ConfigError:
        return
    assert validate(yaml.safe_load(config.to_yaml())) == config
