"""The config: what is read from where, what cannot be read, and what a run's file keeps."""

import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from run_configs import config_of

from dinoray.jobs.cli.arguments import Arguments, PretrainArguments
from dinoray.jobs.cli.config import apply_overrides, differences, load_config, load_run_config, validate
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.config import Config


def mistakes(*overrides: str, file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config("vit_small_imagenet_vanilla", file, ["data.path=/data", *overrides])
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


# What is read from where


def test_an_override_beats_the_file_and_the_file_beats_the_recipe(tmp_path: Path) -> None:
    file = write(tmp_path, "optim: {base_lr: 0.1, min_lr: 0.2}\ntrain: {epochs: 7}\n")
    config = load_config("demo", file, ["optim.base_lr=0.3"])
    assert config.optim.base_lr == 0.3
    assert config.optim.min_lr == 0.2
    assert config.train.epochs == 7
    assert config.train.global_batch_size == RECIPES["demo"]()["train"]["global_batch_size"]
    assert config.optim.momentum == 0.9  # nobody's but the default


def test_the_later_override_wins() -> None:
    assert config_of("train.seed=1", "train.seed=2").train.seed == 2


def test_the_recipe_may_be_named_on_the_command_line_in_an_override_or_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "recipe: photos_small\ndata: {path: /x}\n")
    assert load_config("demo", None, []).recipe == "demo"
    assert load_config(None, file, []).recipe == "photos_small"
    assert load_config(None, file, ["recipe=vit_base_imagenet"]).recipe == "vit_base_imagenet"
    assert load_config("resnet50_imagenet", file, ["recipe=vit_base_imagenet"]).recipe == "resnet50_imagenet"


def test_a_run_is_named_after_its_recipe_unless_it_is_named() -> None:
    assert config_of().name == "vit_small_imagenet_vanilla"
    assert config_of("name=first").name == "first"


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 0.001), ("1e6", 1e6), ("1.5e3", 1500.0), ("2E+1", 20.0), (".5", 0.5), ("3", 3)],
)
def test_a_number_is_a_number_however_it_is_written(tmp_path: Path, text: str, number: float) -> None:
    file = write(
        tmp_path, f"data: {{path: /data}}\noptim: {{base_lr: {text}}}\nbackbone: {{kwargs: {{x: {text}}}}}"
    )
    for config in (
        config_of(f"optim.base_lr={text}", f"backbone.kwargs.x={text}"),
        load_config("vit_small_imagenet_vanilla", file, []),
    ):
        assert config.optim.base_lr == number
        # Nothing but the reader of YAML could make a number of this one: any value is allowed here.
        assert config.backbone.kwargs == {"x": number}


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    assert config_of("data.max_pixels=1e8").data.max_pixels == 100_000_000


@pytest.mark.parametrize(
    "text", ["on", "no", "08", "010", "2024", "2024-01-01", "1e3", "true", "a: b", "*", "x #1"]
)
def test_text_stands_for_itself_whatever_yaml_makes_of_it(text: str) -> None:
    config = config_of(f"data.path={text}", f"data.label_column={text}")
    assert (config.data.path, config.data.label_column) == (text, text)


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_text_that_is_optional_can_be_unset(text: str) -> None:
    assert load_config("demo", None, [f"eval.val_path={text}"]).eval.val_path is None


def test_on_and_off_switch_a_flag_but_are_no_numbers(tmp_path: Path) -> None:
    assert config_of("head.use_bn=on").head.use_bn is True
    file = write(tmp_path, "name: off\nhead: {norm_last_layer: no}\ntrain: {epochs: on}\n")
    assert mistakes(file=file) == ["train.epochs='on': must be a number (default 100)"]
    config = load_config("vit_small_imagenet_vanilla", file, ["data.path=/data", "train.epochs=1"])
    assert (config.name, config.head.norm_last_layer) == ("off", False)


def test_a_year_as_a_name_in_a_file_has_to_be_quoted(tmp_path: Path) -> None:
    assert mistakes(file=write(tmp_path, "name: 2024")) == ["name=2024: must be text: quote it"]
    assert load_config("demo", write(tmp_path, "name: '2024'"), []).name == "2024"


def test_arguments_of_the_backbone_are_merged_one_by_one() -> None:
    recipe = RECIPES["demo"]()["backbone"]["kwargs"]
    config = load_config("demo", None, ["backbone.kwargs.depth=7", "backbone.kwargs={init_values: 1e-5}"])
    assert config.backbone.kwargs == {**recipe, "depth": 7, "init_values": 1e-5}
    assert RECIPES["demo"]()["backbone"]["kwargs"] == recipe


def test_another_backbone_does_not_get_the_arguments_of_the_recipes_one() -> None:
    config = load_config("demo", None, ["backbone.name=resnet18"])
    assert (config.backbone.name, config.backbone.kwargs) == ("resnet18", {})
    assert config.backbone.drop_path_rate == 0.0
    same = RECIPES["demo"]()["backbone"]
    assert load_config("demo", None, [f"backbone.name={same['name']}"]).backbone.kwargs == same["kwargs"]


def test_applying_overrides_leaves_the_tree_as_it_was() -> None:
    tree = {"a": {"b": {"c": [1]}}}
    changed = apply_overrides(tree, ["a.b.d=2"])
    changed["a"]["b"]["c"].append(3)
    assert tree == {"a": {"b": {"c": [1]}}}


def test_options_may_stand_among_the_overrides() -> None:
    parser = Arguments("pretrain", "", Config)
    arguments = parser.parse_args(["a=1", "--recipe", "demo", "b=2", "--resume", "c=3"])
    assert arguments.overrides == ["a=1", "b=2", "c=3"]
    assert (arguments.recipe, arguments.resume) == ("demo", True)


def test_a_key_that_is_not_text_is_refused_and_taken_in_quotes() -> None:
    with pytest.raises(ConfigError, match="key 1 is not text, put it in quotes"):
        load_config("demo", None, ["backbone.kwargs={1: 2}"])
    assert load_config("demo", None, ["backbone.kwargs={'1': 2}"]).backbone.kwargs["1"] == 2


def test_help_names_every_section_and_only_settings_that_exist() -> None:
    text = PretrainArguments().format_help()
    sections = {
        name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")
    }
    assert sections <= set(re.findall(r"^  (\w+)  +[A-Z]", text, re.MULTILINE))
    keys = dict(flatten(load_config("demo", None, []).model_dump()))
    named = re.findall(r"^  ([\w.]+)=[A-Z]", text, re.MULTILINE)
    assert "data.path" in named
    assert set(named) <= set(keys)


def test_a_wrong_option_is_a_config_error() -> None:
    for wrong in (["--optim.base_lr=1"], ["--recipe"]):
        with pytest.raises(ConfigError, match=f"{wrong[0]}.*settings are written as section.key=value"):
            Arguments("pretrain", "", Config).parse_args(wrong)


# What is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demoo", "did you mean demo?"),
        ("vit_smal_imagenet_boost", "did you mean vit_small_imagenet_boost"),
        ("[1]", "must be one of demo, photos_small"),
        ("", "must be one of demo, photos_small"),
    ],
)
def test_an_unknown_recipe_is_answered_with_the_known_ones(name: str, words: str) -> None:
    for load in (lambda: load_config(name, None, []), lambda: load_config(None, None, [f"recipe={name}"])):
        with pytest.raises(ConfigError) as error:
            load()
        assert words in str(error.value)
        assert all(recipe in str(error.value) for recipe in RECIPES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"optim: {base_lr: 1\n", "is not YAML: expected ',' or '}', but got '<stream end>' at line 2"),
        (
            b"optim:\n\tbase_lr: 1\n",
            "is not YAML: found character '\\t' that cannot start any token at line 2",
        ),
        (b"- optim\n", "must hold a mapping of sections, not a list"),
        (b"hello", "must hold a mapping of sections, not a str"),
        (b"\xff\xfe\x00", "is not YAML: it is not UTF-8 text"),
        (b"train: {seed: 1}\ntrain: {epochs: 1}\n", "is not YAML: key 'train' is given 2 times at line 1"),
        (b"train: !!python/object:os.system {}\n", "is not YAML: could not determine a constructor"),
        (b"[" * 5000, "is not YAML: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: bytes, words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    (line,) = mistakes(file=file)
    assert line.startswith(f"--config {file} {words}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert mistakes(file=tmp_path / "none.yaml") == [
        f"--config {tmp_path}/none.yaml: No such file or directory; check the path"
    ]
    assert mistakes(file=tmp_path) == [f"--config {tmp_path}: Is a directory; check the path"]


def test_text_that_no_file_can_hold_is_refused() -> None:
    (line,) = mistakes(r'backbone.kwargs={"\ud800": 1}')
    assert "text is not Unicode" in line


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config("demo", write(tmp_path, "# nothing yet\n"), []) == load_config("demo", None, [])


# What is kept


def test_a_config_cannot_be_changed() -> None:
    config = config_of()
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.base_lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resolved_config_is_a_config_file(tmp_path: Path, recipe: str) -> None:
    config = load_config(recipe, None, ["data.path=/data", "name=1e3", "eval.k=[5]"])
    file = write(tmp_path, config.to_yaml())
    assert load_config(None, file, []) == config
    assert validate(yaml.safe_load(config.to_yaml())) == config  # any other reader sees the same


def test_a_resolved_config_has_the_network_that_was_chosen_not_the_recipes(tmp_path: Path) -> None:
    config = load_config("demo", None, ["backbone.name=resnet18", "backbone.kwargs.zero_init_last=false"])
    assert load_config(None, write(tmp_path, config.to_yaml()), []) == config


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_text_survives_the_file(text: str) -> None:
    config, kwargs = config_of(), {f"x{text}": text}
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"kwargs": kwargs})})
    assert validate(yaml.safe_load(config.to_yaml())).backbone.kwargs == kwargs
    with tempfile.TemporaryDirectory() as folder:
        run = Directory(folder)
        run.write("config.yaml", config.to_yaml().encode())
        assert load_run_config(run) == config


def test_the_config_of_a_run_takes_overrides_and_names_itself(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path} is not a run directory: nothing is there; give the "):
        load_run_config(run)
    run.write("notes.txt", b"")
    with pytest.raises(ConfigError, match=f"{tmp_path} is not a run directory: it has no config.yaml"):
        load_run_config(run)
    run.write("config.yaml", config_of().to_yaml().encode())
    assert load_run_config(run, ["eval.k=[3]"]).eval.k == (3,)
    with pytest.raises(ConfigError, match=r"^eval.kk=3: unknown key; did you mean eval.k\?$"):
        load_run_config(run, ["eval.kk=3"])
    run.write("config.yaml", b"optim: {warmup: 1}\nname: x\nrecipe: demo\ndata: {path: /data}\n")
    with pytest.raises(
        ConfigError, match=rf"^{tmp_path}/config.yaml: optim.warmup=1: unknown key; did you mean"
    ):
        load_run_config(run)
    run.write("config.yaml", b"\xff")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/config.yaml is not YAML"):
        load_run_config(run)


def test_a_file_of_an_earlier_version_is_read_without_settings_that_are_gone(tmp_path: Path) -> None:
    text = config_of().to_yaml().replace("data:\n", "data:\n  fetch_attempts: 5\n")
    assert "fetch_attempts" in text
    (tmp_path / "config.yaml").write_text(text)
    assert load_run_config(Directory(str(tmp_path))) == config_of()
    assert load_config(None, tmp_path / "config.yaml", []) == config_of()


@pytest.mark.parametrize("kind", ["cpus", "gpus"])
def test_an_evaluator_that_there_is_not_needs_nothing(kind: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^resources\.evaluator_{kind}=2 is for eval\.where=side; set that, or resources\.evaluator_{kind}=0$",
    ):
        config_of(f"resources.evaluator_{kind}=2")


def test_only_what_decides_what_is_learnt_is_a_difference() -> None:
    old = config_of()
    free = [
        *(
            "resources.train_workers=4",
            "resources.use_gpu=false",
            "log.every_steps=3",
            "checkpoint.every_steps=7",
        ),
        *("storage_path=/elsewhere", "name=other", "data.streams=4"),
        *("eval.where=side", "eval.max_under_way=3", "resources.evaluator_cpus=2"),
    ]
    assert differences(old, config_of(*free)) == []
    assert differences(old, config_of("optim.base_lr=0.1", "train.seed=5", *free)) == [
        "optim.base_lr: 0.0005 -> 0.1",
        "train.seed: 0 -> 5",
    ]
    assert differences(old, config_of("backbone.kwargs.depth=3")) == [
        "backbone.kwargs: {} -> None",
        "backbone.kwargs.depth: None -> 3",
    ]
    assert differences(old, config_of("data.path=/data2")) == ["data.path: /data -> /data2"]
