"""Wrong keys and wrong values of a config: each is one line with the key, the value, the rule and the remedy."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.keys import did_you_mean, leaf_fields
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten


def mistakes(*overrides: str, file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config("vit_small_imagenet_vanilla", file, ["data.path=/data", *overrides])
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


class Inner(BaseModel):
    b: int
    c: dict[str, int] = {}


class Outer(BaseModel):
    a: Inner = Inner(b=1)
    d: int | None = None


def test_the_keys_are_those_that_can_be_set_in_the_order_of_declaration() -> None:
    assert list(leaf_fields(Outer)) == ["a.b", "a.c", "d"]


def test_a_tree_is_flattened_down_to_its_values() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {"x": 2, "y": {}}}, "d": None})) == {
        "a.b": 1,
        "a.c.x": 2,
        "a.c.y": {},
        "d": None,
    }


def test_no_more_than_three_keys_are_proposed_the_likeliest_first() -> None:
    known = ["rate_of_b", "rate_of_c", "rate_of_d", "rate_of_e", "x"]
    assert did_you_mean("rate_of_d", known).startswith("; did you mean rate_of_d or ")
    assert did_you_mean("rate_of_d", known).count(" or ") == 2
    assert did_you_mean("qqq", known) == ""
    assert did_you_mean("x", []) == ""


def test_a_key_of_an_earlier_version_is_answered_with_its_replacement() -> None:
    [mistake] = mistakes("data.fetch_attempts=1")
    assert mistake == "data.fetch_attempts=1: unknown key; set storage.give_up_after_seconds instead"


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optim.lrr=1", "optim.base_lr or optim.min_lr"),
        ("lr=1", "optim.base_lr or optim.min_lr or probe.linear_lrs"),
        ("optimizer.base_lr=1", "optim.base_lr"),
        ("optim.base_lrr=1", "optim.base_lr"),
        ("out_dim=1", "head.out_dim"),
        ("teacher.out_dim=1", "head.out_dim"),
        ("epochs=1", "train.epochs"),
        ("batch_size=1", "eval.batch_size or probe.linear_batch_size or train.global_batch_size"),
        (
            "train.batch_size=1",
            "train.global_batch_size or eval.batch_size or train.max_batch_size_per_worker",
        ),
        (
            "momentum_teacher=1",
            "teacher.teacher_momentum or init.freeze_teacher_momentum or teacher.final_teacher_momentum",
        ),
        ("loss.center_momemtum=1", "loss.center_momentum"),
        ("dta.path=1", "data.path"),
        ("storge_path=1", "storage_path"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(override: str, near: str) -> None:
    assert mistakes(override) == [f"{override}: unknown key; did you mean {near}?"]


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        (
            "backbone.patch_size=8",
            "arguments of the network stand in backbone.kwargs: set backbone.kwargs.patch_size=8",
        ),
        (
            "backbone.depth=3",
            "arguments of the network stand in backbone.kwargs: set backbone.kwargs.depth=3",
        ),
        ("backbone.in_chans=1", "leave out in_chans: set data.channels instead"),
        ("backbone.num_classes=0", "leave out num_classes: the backbone has no classifier"),
        ("backbone.pretraned=true", "did you mean backbone.pretrained?"),
        ("backbone.drop_path=0", "did you mean backbone.drop_path_rate?"),
    ],
)
def test_an_argument_of_the_network_is_not_taken_for_another_key(override: str, instead: str) -> None:
    (line,) = mistakes(override)
    assert line.partition(": unknown key; ")[2] == instead


@pytest.mark.parametrize("override", ["model.depth=3", "arch.x=1", "data.shards=1", "train.amp=true"])
def test_no_key_is_proposed_that_shares_letters_alone(override: str) -> None:
    (line,) = mistakes(override)
    assert line.endswith("unknown key; --print-config shows all keys")


def test_a_key_like_no_other_is_answered_with_the_way_to_all_keys() -> None:
    assert mistakes("qqq.zzz=1") == ["qqq.zzz=1: unknown key; --print-config shows all keys"]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["optim.base_lr=-1"], ["optim.base_lr=-1: must be greater than 0 (default 0.0005)"]),
        (["optim.base_lr=fast"], ["optim.base_lr='fast': must be a number (default 0.0005)"]),
        (["optim.name=adam"], ["optim.name='adam': must be 'adamw', 'sgd' or 'lars' (default \"adamw\")"]),
        (["train.epochs=0"], ["train.epochs=0: must be greater than 0 (default 100)"]),
        (
            ["train.global_batch_size=1.5"],
            ["train.global_batch_size=1.5: must be a whole number (default 512)"],
        ),
        (["head.use_bn=perhaps"], ["head.use_bn='perhaps': must be true or false (default false)"]),
        (
            ["resources.use_gpu=2"],
            ["resources.use_gpu=2: must be true or false or 'auto' (default \"auto\")"],
        ),
        (
            ["resources.augment_actors=many"],
            [
                "resources.augment_actors='many': must be a whole number or a list or 'auto' (default \"auto\")"
            ],
        ),
        (["eval.k=[1, x]"], ["eval.k=[1, 'x']: each item must be a whole number (default [10, 20])"]),
        (["eval.k=5"], ["eval.k=5: must be a list (default [10, 20])"]),
        (
            ["crops.global_crop_scale=[a, b]"],
            ["crops.global_crop_scale=['a', 'b']: each item must be a number "],
        ),
        (
            ["crops.global_crop_scale=[0.9, 0.1]"],
            ["crops.global_crop_scale: (0.9, 0.1) must be (lowest, highest)"],
        ),
        (
            ["crops.num_global_crops=3"],
            ["crops: global_blur_prob=(1.0, 0.1) has 2 values for num_global_crops=3; "],
        ),
        (
            ["data.path=gs://bucket"],
            ["data.path: 'gs://bucket' has the scheme gs://; use a local path or s3://"],
        ),
        (
            ["storage_path=s3://"],
            ["storage_path: 's3://' is not an S3 address; write s3://bucket/prefix (default "],
        ),
        (
            ["name=a/b"],
            ["name='a/b': must be letters, digits, '.', '_' and '-', beginning with a letter or digit"],
        ),
        (
            ["data=/photos"],
            ["data='/photos': must be a section, with its keys in it; did you mean data.path=/photos?"],
        ),
        (
            ["optim=3"],
            ["optim=3: must be a section, with its keys in it: optim.name, optim.base_lr, optim.min_lr, ..."],
        ),
        (
            ["optim="],
            [
                "optim=None: must be a section, with its keys in it: optim.name, optim.base_lr, optim.min_lr, ..."
            ],
        ),
        (["data.path.x=1"], ["data.path={'x': 1}: must be one text: write data.path=TEXT"]),
        (["optim"], ["override 'optim' must look like section.key=value, e.g. optim.base_lr=1e-3"]),
        (["=1", "a..b=1"], ["override '=1' must look like", "override 'a..b=1' must look like"]),
        (
            ["backbone.kwargs={a: 1"],
            ["override 'backbone.kwargs={a: 1': the value is not YAML: expected ',' or '}'"],
        ),
        (
            ["backbone.kwargs={a: 1, a: 2}"],
            ["override 'backbone.kwargs={a: 1, a: 2}': the value is not YAML: key 'a'"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_value_is_named_with_its_rule(overrides: list[str], lines: list[str]) -> None:
    found = mistakes(*overrides)
    assert len(found) == len(lines)
    for line, beginning in zip(found, lines, strict=True):
        assert line.startswith(beginning)


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optim: {base_lr: -1, momentun: 0.5}\nheads: {out_dim: 8, hidden_dim: 8}\n")
    assert sorted(mistakes("train.epochs=no", "eval.k=[0.5]", file=file)) == [
        "eval.k=[0.5]: each item must be a whole number (default [10, 20])",
        "heads.hidden_dim=8: unknown key; did you mean head.hidden_dim?",
        "heads.out_dim=8: unknown key; did you mean head.out_dim?",
        "optim.base_lr=-1: must be greater than 0 (default 0.0005)",
        "optim.momentun=0.5: unknown key; did you mean optim.momentum?",
        "train.epochs='no': must be a number (default 100)",
    ]


def test_what_must_be_set_is_named_as_one_sets_it() -> None:
    with pytest.raises(ConfigError, match=r"^data.path: must be set, e.g. data.path=s3://bucket/train$"):
        load_config("vit_small_imagenet_vanilla", None, [])


@pytest.mark.parametrize(
    "override",
    [
        "data.path=s3://AKIA:MARKER@bucket/images",
        "storage_path=s3://AKIA:MARKER@bucket/runs",
        "init.from=https://me:MARKER@host/weights.pth",
        "data.aws_secret_access_key=MARKER",
        "data={password: MARKER, path: s3://b/i}",
        "wandb_api_key=MARKER",
        "dta.path=s3://AKIA:MARKER@bucket/images",
        "name=s3://AKIA:MARKER@b",
        "train.seed=s3://AKIA:MARKER@b",
        "data.path=s3://AKIA:MAR/MARKER@bucket/images",
        "init.from=https://me:p@MARKER@host/weights.pth",
    ],
)
def test_what_looks_like_a_secret_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("demo", None, [override])
    assert "MARKER" not in str(error.value)
