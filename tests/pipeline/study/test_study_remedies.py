"""Studies that cannot be searched or read: following the message's remedy ends the error."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from remedies import settings_to_set
from studies import tried, write_tried
from study_configs import study

from dinoray.jobs.studies.config import space_of
from dinoray.jobs.studies.resources import plan_of
from dinoray.models.errors import ConfigError, DataError, DinorayError, ResourceError
from dinoray.pipeline.ray_private.tune import check_pb2
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.yaml_text import Loader
from dinoray.pipeline.study.objective import choose
from dinoray.pipeline.study.search import population
from dinoray.pipeline.study.search.progress import check_any_ran, member_start
from dinoray.pipeline.study.space import Domain, parse_space
from dinoray.pipeline.study.trials import Trial, read_trials

# Spaces


@pytest.mark.parametrize(
    ("tree", "mended"),
    [
        ([1, 2], None),
        ({"a": 3}, None),
        ({"a": {"uniform": 3}}, None),
        ({"a": {"uniform": [2, 1]}}, {"uniform": [1, 2]}),
        ({"a": {"int": [1.5, 3]}}, {"int": [1, 3]}),
        ({"a": {"log": [0, 1]}}, {"log": [0.1, 1]}),
        ({"a": {"one_minus_log": [0.5, 1]}}, None),
        ({"a": {"choice": [1, 1]}}, {"choice": [1, 2]}),
    ],
    ids=str,
)
def test_a_domain_is_written_as_the_message_writes_it(tree: Any, mended: Any) -> None:
    """By its rule or, where it gives examples, by each of them."""
    with pytest.raises(ValueError, match=r"must|write") as error:
        parse_space(tree)
    examples = re.findall(r"\{\w+: \[[^]]*\]\}", str(error.value).partition("; write ")[2])
    if "e.g. [" in str(error.value):
        examples = [f"{{one_minus_log: {str(error.value).rpartition('e.g. ')[2]}}}"]
    elif "e.g. " in str(error.value):
        examples = re.findall(r"\{\w+: \[[^]]*\]\}", str(error.value).partition("e.g. ")[2])
    domains = [mended] if mended else [yaml.load(text, Loader) for text in examples]
    assert domains
    for domain in domains:
        parse_space({"a": domain})


def test_an_empty_space_is_left_out() -> None:
    with pytest.raises(ConfigError, match=r"; leave it out for the default( \(default null\))?$"):
        study("tune.space={}")
    assert space_of(study())


# Objectives


@pytest.mark.parametrize(("labelled", "objective"), [(True, "knn"), (False, "rankme")])
def test_an_objective_is_one_of_those_that_are_named(labelled: bool, objective: str) -> None:
    with pytest.raises(ConfigError, match=r"; set tune\.objective=knn with labels, or rankme without$"):
        choose("loss", keys=["loss.teacher_temp"], labelled=labelled, k=20)
    choose(objective, keys=["loss.teacher_temp"], labelled=labelled, k=20)


@pytest.mark.parametrize(("labelled", "objective"), [(True, "knn"), (False, "rankme")])
def test_nearest_neighbours_get_labels_or_another_objective(labelled: bool, objective: str) -> None:
    with pytest.raises(ConfigError, match=r"; or set tune\.objective=rankme$"):
        choose("knn", keys=[], labelled=False, k=20)
    choose(objective, keys=[], labelled=labelled, k=20)


# Clusters


@pytest.mark.parametrize(
    ("overrides", "have"),
    [
        (["tune.max_concurrent=9"], {"CPU": 7}),
        (["tune.scheduler=pb2", "tune.trials=8"], {"CPU": 7}),
        (["tune.scheduler=pb2", "tune.trials=8"], {"CPU": 4}),
        (["resources.use_gpu=true"], {"CPU": 64}),
        (["resources.use_gpu=true", "resources.train_workers=4"], {"CPU": 64, "GPU": 2}),
    ],
    ids=str,
)
def test_a_study_fits_once_it_is_as_the_message_says(
    overrides: list[str], have: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = study(*overrides)
    with pytest.raises(ResourceError) as error:
        plan_of(config, config.tune.trials, have)
    followed = study(*overrides, *settings_to_set(str(error.value)))
    assert followed != config
    plan_of(followed, followed.tune.trials, have)


@pytest.mark.parametrize(
    "lower",
    [
        "resources.train_workers=1",
        "resources.augment_actors=1",
        "resources.cpus_per_train_worker=0.5",
        "resources.cpus_per_augment_actor=0.5",
    ],
)
def test_a_trial_fits_with_less_of_any_of_the_settings_that_are_named(lower: str) -> None:
    resources = ["resources.train_workers=2", "resources.augment_actors=2"]
    with pytest.raises(ResourceError, match=r": lower .*") as error:
        plan_of(study(*resources), 4, {"CPU": 4})
    assert lower.partition("=")[0] in str(error.value)
    plan_of(study(*resources, lower), 4, {"CPU": 4})


def test_a_study_fits_on_nodes_that_will_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    config = study("resources.use_gpu=true")
    with pytest.raises(ResourceError, match=r"with (tune\.cluster_cpus) and (tune\.cluster_gpus)$"):
        plan_of(config, 4, {"CPU": 4})
    plan_of(study("resources.use_gpu=true", "tune.cluster_cpus=64", "tune.cluster_gpus=8"), 4, {"CPU": 4})


# Populations


def test_a_population_without_scikit_learn_is_another_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an installation without it; nothing but a population needs it."""
    check_pb2()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError) as error:
        population.check_population()
    assert study(*settings_to_set(str(error.value))).tune.scheduler == "asha"


def test_a_member_goes_on_in_the_space_that_it_had() -> None:
    trial = Trial(3, {"loss.teacher_temp": 0.05}, 0, "pb2")
    space = {"loss.teacher_temp": Domain(kind="uniform", values=(0.01, 0.04))}
    with pytest.raises(ConfigError, match=r"; set it as it was, or another name=\.\.\. to start anew$"):
        member_start(space, trial)
    member_start({"loss.teacher_temp": Domain(kind="uniform", values=(0.04, 0.06))}, trial)


# Trials


@pytest.mark.parametrize("followed", ["another name", "remove"])
def test_a_study_of_failed_trials_is_begun_anew(followed: str, tmp_path: Path) -> None:
    directory = Directory(f"{tmp_path}/s")
    for number in range(2):
        write_tried(directory, tried(number, None, "failed", message="depth must be above 0"))
    with pytest.raises(
        DinorayError, match=r", and search under another name=\.\.\., or remove (\S+)$"
    ) as error:
        check_any_ran(directory)
    if followed == "remove":
        shutil.rmtree(str(error.value).rpartition(" ")[2])
    else:
        directory = Directory(f"{tmp_path}/t")
    write_tried(directory, tried(0, 0.5))
    check_any_ran(directory)


@pytest.mark.parametrize("followed", ["mend", "remove"])
def test_a_damaged_trial_is_mended_or_removed(followed: str, tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    for number in range(2):
        write_tried(directory, tried(number, 0.5))
    (damaged,) = (tmp_path / "trials/0001").glob("outcome*")
    text = damaged.read_text()
    damaged.write_text("{")
    with pytest.raises(DataError, match=r"outcome\S* is damaged: .*; mend or remove the trial$"):
        read_trials(directory)
    if followed == "mend":
        damaged.write_text(text)
    else:
        shutil.rmtree(damaged.parent)
    assert len(read_trials(directory)) == (2 if followed == "mend" else 1)
