"""--print-config: every setting with its description and source, in a form that `--config` reads back."""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from tiny_run import write_run

from dinoray.jobs.cli.arguments import PretrainArguments
from dinoray.jobs.cli.config import load, load_config
from dinoray.jobs.cli.keys import leaf_fields
from dinoray.jobs.cli.print_config import describe_config
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.cluster.plan_config import PlanConfig
from dinoray.jobs.studies.config import NAME_SUFFIX, StudyConfig
from dinoray.models.errors import ConfigError
from dinoray.pipeline.worker.config import Config

MODELS: dict[str, type[Config]] = {"pretrain": Config, "tune": StudyConfig, "plan": PlanConfig}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab: #'\n\"-", max_size=4), inner, max_size=3)
    ),
)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, job: str = "pretrain") -> str:
    importlib.import_module(f"jobs.{job}").main([*arguments, "--print-config"])
    return capsys.readouterr().out


def line_of(text: str, key: str) -> str:
    lines = re.findall(rf"^ *{key}:.*$", text, flags=re.MULTILINE)
    return str(lines[0]).strip()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("job", MODELS)
def test_what_is_printed_is_read_back_as_the_same_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, job: str
) -> None:
    given_ = ["data.path=s3://b/i", "eval.k=[7]", "storage_path=s3://b/runs"]
    file = tmp_path / "config.yaml"
    file.write_text(printed(capsys, "--recipe", recipe, *given_, job=job))
    suffix = NAME_SUFFIX if job == "tune" else ""
    expected = load(MODELS[job], recipe, None, given_, name_suffix=suffix)
    assert load(MODELS[job], None, file, []) == expected
    # Any other reader of YAML sees the same.
    assert yaml.safe_load(file.read_text()) == expected.model_dump(mode="json")


@settings(deadline=None, max_examples=30)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), VALUES)
def test_any_value_is_read_back(text: str, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "1.yaml"), Path(folder, "2.yaml")
        kwargs = {f"x{text}": text, "value": value, "nested": {"a": {"b": value}}}
        tree = {"data": {"path": "/x"}, "backbone": {"name": "resnet18", "kwargs": kwargs}}
        first.write_text(yaml.safe_dump(tree))
        arguments = PretrainArguments().parse_args(["--config", str(first)])
        second.write_text(describe_config(Config, arguments))
        assert load_config(None, second, []) == load_config(None, first, [])


@pytest.mark.parametrize("job", MODELS)
def test_every_setting_is_described_and_has_a_source(capsys: pytest.CaptureFixture[str], job: str) -> None:
    text = printed(capsys, job=job)
    flat = re.sub(r"\s+", " ", re.sub(r"^ *# ", " ", text, flags=re.MULTILINE))
    for key, field in leaf_fields(MODELS[job]).items():
        name = key.rpartition(".")[2]
        assert re.search(rf"^ *(# )?{name}:.*  # (default|recipe demo|must be set)", text, re.MULTILINE), key
        assert " ".join(str(field.description).split()) in flat, key
    assert [line for line in text.splitlines() if line.lstrip().startswith("# ") and len(line) > 110] == []


def test_the_source_of_each_value_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: vit_small_imagenet_boost\noptim: {min_lr: 1e-7}\nhead: {out_dim: 9}\n")
    arguments = ["--config", str(file), "head.out_dim=8", "backbone.kwargs.depth=3", "--init-from", "w.pth"]
    text = printed(capsys, *arguments, "data={path: /x, max_pixels: 1e6}")
    assert line_of(text, "min_lr") == f"min_lr: 1.0e-07  # file {file}"
    assert line_of(text, "recipe") == f"recipe: vit_small_imagenet_boost  # file {file}"
    assert line_of(text, "out_dim") == "out_dim: 8  # command line"
    assert line_of(text, "kwargs") == "kwargs: {depth: 3}  # command line"
    assert line_of(text, "max_pixels") == "max_pixels: 1000000  # command line"
    assert line_of(text, "from") == "from: w.pth  # command line"
    assert line_of(text, "teacher_temp") == "teacher_temp: 0.07  # recipe vit_small_imagenet_boost"
    assert line_of(text, "base_lr") == "base_lr: 0.0005  # default"
    assert line_of(printed(capsys, "--recipe", "photos_small"), "recipe").endswith("# command line")
    # Arguments of the recipe's network are not those of another.
    assert line_of(printed(capsys, "backbone.name=resnet18"), "kwargs") == "kwargs: {}  # default"


@pytest.mark.parametrize("job", MODELS)
def test_settings_that_must_be_given_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    text = printed(capsys, "--recipe", "vit_small_imagenet_vanilla", job=job)
    assert "  # path: s3://bucket/train  # must be set, e.g. data.path=s3://bucket/train" in text
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert load(MODELS[job], None, file, ["data.path=/x"]).data.path == "/x"
    with pytest.raises(ConfigError, match=r"^data\.path: must be set, e\.g\."):
        load(MODELS[job], None, file, [])


@pytest.mark.parametrize("job", MODELS)
def test_other_mistakes_are_still_named(capsys: pytest.CaptureFixture[str], job: str) -> None:
    wrong = ["--recipe", "vit_small_imagenet_vanilla", "optim.lrr=1", "train.epochs=no"]
    with pytest.raises(ConfigError) as caught:
        printed(capsys, *wrong, job=job)
    assert [line.partition(":")[0] for line in sorted(str(caught.value).splitlines())] == [
        "optim.lrr=1",
        "train.epochs='no'",
    ]


def test_the_best_of_a_study_is_printed_with_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_run(tmp_path / "study")
    (study / "config.yaml").rename(study / "best.yaml")
    text = printed(capsys, "--from-study", str(study), "train.epochs=7")
    assert line_of(text, "epochs") == "epochs: 7.0  # command line"
    assert line_of(text, "out_dim") == f"out_dim: 64  # study {study}"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m jobs.plan --print-config | head -n 2; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.stderr, len(ended.stdout.splitlines())) == ("", 2)
