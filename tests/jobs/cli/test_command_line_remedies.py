"""Mistakes of a command line or a file: once the message's remedy is followed, there is a config."""

import json
import re
import shlex
import socket
from pathlib import Path

import pytest
import ray
from servers import free_ports

from dinoray.jobs.cli.arguments import PretrainArguments, pretrain_config
from dinoray.jobs.cli.config import load_config, load_run_config
from dinoray.jobs.cli.main import _check_address, is_local, start_ray
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.models.settings import flatten
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.trials import BEST, STUDY
from dinoray.pipeline.worker.config import Config


def config_of(*words: str) -> Config:
    return pretrain_config(PretrainArguments().parse_args(words))


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        config_of(*words)
    return str(error.value)


# Options


def test_an_option_that_there_is_not_is_written_as_a_setting() -> None:
    assert refusal("--optim.base_lr=1").endswith("settings are written as section.key=value")
    assert config_of("optim.base_lr=1").optim.base_lr == 1


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "; --help lists the options; " in refusal("--recipee", "demo")
    with pytest.raises(SystemExit, match=r"^0$"):
        config_of("--help")
    assert "--recipe" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--recipe=demo", "--config=mine.yaml"])
def test_a_study_sets_the_whole_config(option: str, tmp_path: Path) -> None:
    (tmp_path / BEST).write_text(load_config("demo", None, ["train.epochs=7"]).to_yaml())
    message = refusal("--from-study", str(tmp_path), option)
    assert message.endswith("; leave out --recipe and --config")
    assert config_of("--from-study", str(tmp_path)).train.epochs == 7


def test_a_study_has_a_best_config_once_it_has_one(tmp_path: Path) -> None:
    (tmp_path / STUDY).write_text("{}")
    assert "then run its `dinoray tune` command again" in refusal("--from-study", str(tmp_path))
    (tmp_path / BEST).write_text(load_config("demo", None, []).to_yaml())  # as a search that ends writes it
    config_of("--from-study", str(tmp_path))


def test_a_folder_that_is_no_run_gives_way_to_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"; give the directory that the run printed$"):
            load_run_config(Directory(str(folder)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(load_config("demo", None, []).to_yaml())
    load_run_config(Directory(f"{tmp_path}/run"))


# Settings


def test_quotes_keep_a_setting_together() -> None:
    typed = "backbone.kwargs={patch_size: 8, depth: 1}"
    messages = refusal(*shlex.split(typed)).splitlines()
    quoted = re.search(r"quote the whole for the shell: ('.*=)\.\.\.'$", messages[0])
    assert quoted
    (word,) = shlex.split(f"{quoted[1]}{typed.partition('=')[2]}'")
    assert config_of(word).backbone.kwargs["patch_size"] == 8


def test_a_key_of_an_earlier_version_has_another_in_its_place() -> None:
    found = re.search(r"; set ([\w.]+) instead$", refusal("data.fetch_attempts=3"))
    assert found
    config_of(f"{found[1]}=3")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_default_that_is_named_is_that_of_the_recipe(recipe: str) -> None:
    config = load_config(recipe, None, ["data.path=/data"])
    own = dict(flatten(config.model_dump(mode="json")))
    keys = [
        key for key, value in flatten(RECIPES[recipe]()) if not isinstance(value, str) and "kwargs" not in key
    ]
    for key in ["optim.base_lr", "train.epochs", "eval.k", *keys]:
        message = refusal("--recipe", recipe, "data.path=/data", f"{key}=abc")
        found = re.search(r"\(default (.*)\)$", message)
        assert found, message
        assert json.loads(found[1]) == own[key], message


def test_the_default_that_is_named_for_a_run_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load_config("demo", None, ["eval.k=[3]"]).to_yaml())
    with pytest.raises(ConfigError, match=r"\(default \[3\]\)$"):
        load_run_config(Directory(str(tmp_path)), ["eval.k=abc"])


# Files


@pytest.mark.parametrize(
    ("wrong", "says", "mended"),
    [
        (None, "check the path", b"optim: {base_lr: 1}"),
        (b"optim: {base_lr: 1\n", "fix this line", b"optim: {base_lr: 1}\n"),
        (b"optim: {base_lr: 1}\nname: \xff\n", "save it as UTF-8", "optim: {base_lr: 1}\n# \xff\n".encode()),
        (
            b"- base_lr: 1\n",
            "write `section:` and below it, indented, `key: value`",
            b"optim:\n  base_lr: 1\n",
        ),
        (b"name: 2024\noptim: {base_lr: 1}", "must be text: quote it", b"name: '2024'\noptim: {base_lr: 1}"),
        (
            b"5: x\noptim: {base_lr: 1}",
            "put it in quotes at line 1, column 1; fix this line",
            b"optim: {base_lr: 1}",
        ),
    ],
)
def test_a_file_is_read_once_it_is_mended(
    wrong: bytes | None, says: str, mended: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    if wrong is not None:
        file.write_bytes(wrong)
    assert refusal("--config", str(file)).endswith(says)
    file.write_bytes(mended)
    assert config_of("--config", str(file)).optim.base_lr == 1


# Ray


def test_an_address_without_a_head_can_be_unset_or_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(
        ResourceError, match=r"; start a head there, unset RAY_ADDRESS to start a local Ray, "
    ):
        start_ray(ResourcesConfig(), verbose=False)
    with socket.create_server(("127.0.0.1", port)):  # as a head does
        _check_address(f"127.0.0.1:{port}")
    monkeypatch.delenv("RAY_ADDRESS")
    assert is_local()


@pytest.mark.ray
def test_ray_starts_in_the_folder_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 100)
    with pytest.raises(ResourceError) as error:
        start_ray(ResourcesConfig(), verbose=False)
    found = re.search(r"RAY_TMPDIR=(\S+)$", str(error.value))
    assert found
    monkeypatch.setenv("RAY_TMPDIR", found[1])
    try:
        start_ray(ResourcesConfig(), verbose=False)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
