"""Pretraining on own images: nothing of the demo's data is left, whatever the recipe and wherever the images lie.

The job's main runs within this process, up to where Ray would start.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from no_ray import RayStarted, forbid_ray
from samples import parquet, write_all

from dinoray.jobs import pretrain
from dinoray.jobs.cli.config import load, load_config, load_run_config
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.data.demo_images import demo_folder, draw_demo_image
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.config import Config

SMALL = [
    "crops.global_crop_size=32",
    "crops.local_crop_size=16",
    "head.out_dim=64",
    "train.global_batch_size=4",
    "resources.train_workers=1",
]
NETWORK = {
    name: ["backbone.kwargs={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}"] for name in RECIPES
} | {"resnet50_imagenet": ["backbone.name=resnet10t", "backbone.kwargs={}"]}
NETWORK["adapt"] += ["backbone.name=vit_tiny_patch16_224", "init.from=null", "init.freeze_steps=0"]
DEMO = ["recipe=demo", *NETWORK["demo"]]
IMAGES = [draw_demo_image(label, "train", i) for label in ("dots", "rings") for i in range(4)]
LABELS = [label for label in ("dots", "rings") for _ in range(4)]
FORMS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "loose": (
        {f"{i}.jpg": data for i, data in enumerate(IMAGES)},
        "data: 8 images at ",
        "evaluation: RankMe",
    ),
    "classes": (
        {f"{label}/{i}.jpg": data for i, (label, data) in enumerate(zip(LABELS, IMAGES, strict=True))},
        "data: 8 images in 2 class folders at ",
        "evaluation: k-NN of 2 held-out images by 6 others of data.path",
    ),
    "nested": (
        {
            f"{i % 2}/{label}/{i}.jpg": data
            for i, (label, data) in enumerate(zip(LABELS, IMAGES, strict=True))
        },
        "data: 8 images in 2 class folders at ",
        "evaluation: k-NN of 2 held-out images",
    ),
    "parquet": (
        {"a.parquet": parquet({"jpg": IMAGES, "key": [str(i) for i in range(8)], "cls": LABELS})},
        "data: 8 images in 1 Parquet file at ",
        "evaluation: k-NN of 2 held-out images",
    ),
}

Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Starts a job up to its Ray, and returns what it printed."""

    forbid_ray(monkeypatch)
    monkeypatch.setenv("DINORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for form, (files, _, _) in FORMS.items():
        write_all(tmp_path / form, files)

    def start(*arguments: str) -> str:
        with pytest.raises(RayStarted):
            pretrain.main([f"storage_path={tmp_path}/runs", *arguments])
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_takes_each_form_of_images(start: Start, tmp_path: Path, recipe: str, form: str) -> None:
    _, data, evaluation = FORMS[form]
    output = start(f"--recipe={recipe}", f"data.path={tmp_path}/{form}", *SMALL, *NETWORK[recipe])
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("data: ")] == [line for line in lines if data in line]
    assert sum(line.startswith(evaluation) for line in lines) == 1
    assert str(demo_folder()) not in output
    assert not demo_folder().exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_no_address_and_no_rule_for_labels(recipe: str) -> None:
    keys = [key for key, _ in flatten(RECIPES[recipe]())]
    assert not [key for key in keys if key.startswith("data.") or key in ("eval.val_path", "eval.train_path")]


def test_own_images_in_a_file_are_own_images_too(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.dump({"data": {"path": f"{tmp_path}/loose"}}))
    output = start(f"--config={file}", "name=a", *SMALL, *DEMO)
    assert f"data: 8 images at {tmp_path}/loose (no labels" in output
    kept = load_run_config(Directory(str(tmp_path / "runs" / "a")))
    assert (kept.data.path, kept.eval.val_path) == (f"{tmp_path}/loose", "auto")
    again = start(f"--config={tmp_path}/runs/a/config.yaml", "name=b", *SMALL)
    assert f"data: 8 images at {tmp_path}/loose (no labels" in again


def test_without_own_images_the_demo_has_its_own() -> None:
    for recipe in (None, "demo"):
        config = load(Config, recipe, None, ["train.epochs=1"], looks=True)
        assert config.data.path == str(demo_folder() / "train")
        assert config.eval.val_path == str(demo_folder() / "val")
        assert config.data.label_from_parent is True
    assert load_config(None, None, ["eval.val_path=/mine"]).eval.val_path == "/mine"


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "demo"])
def test_any_other_recipe_wants_images(recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path: must be set, e\.g\. data\.path=s3://bucket/train$"):
        load_config(recipe, None, [])


def test_a_resumed_run_keeps_what_was_detected_and_how_it_is_evaluated(start: Start, tmp_path: Path) -> None:
    arguments = [f"data.path={tmp_path}/classes", "name=r", *SMALL, *DEMO]
    first = start(*arguments)
    write_all(tmp_path / "classes", {f"{i}.jpg": data for i, data in enumerate(IMAGES * 3)})
    assert start(*arguments) == first
    assert "2 class folders" not in start(*arguments, "name=new")


def test_a_run_of_an_older_version_goes_on_as_it_began(start: Start, tmp_path: Path) -> None:
    arguments = [f"data.path={tmp_path}/classes", "name=old", *SMALL, *DEMO]
    old = ["data.image_column=image", "data.key_column=null", "data.label_column=null"]
    old += ["data.label_from_parent=false", "eval.val_path=null"]  # the defaults of that time, written out
    start(*arguments, *old)
    output = start(*arguments)
    assert "(no labels)" in output
    assert "evaluation: RankMe" in output
    kept = load_run_config(Directory(str(tmp_path / "runs" / "old")))
    assert (kept.data.label_from_parent, kept.eval.val_path) == (False, None)


def test_settings_override_what_was_detected(start: Start, tmp_path: Path) -> None:
    arguments = [f"data.path={tmp_path}/classes", *SMALL, *DEMO]
    assert "evaluation: RankMe" in start(*arguments, "name=a", "data.label_from_parent=false")
    output = start(*arguments, "name=b", "eval.val_path=null")
    assert (
        "evaluation: RankMe and CLID, which need no labels; for k-NN start a run with another name" in output
    )
    assert "evaluation: k-NN of 2 held-out images" in start(*arguments, "name=c", "eval.val_path=auto")
    output = start(*arguments, "name=d", f"eval.val_path={tmp_path}/nested")
    assert f"evaluation: k-NN of 8 images at {tmp_path}/nested by 8 at {tmp_path}/classes" in output


def test_the_remedy_for_missing_labels_gives_them(start: Start, tmp_path: Path) -> None:
    arguments = [f"data.path={tmp_path}/loose", *SMALL, *DEMO]
    output = start(*arguments, "name=a")
    assert "for k-NN set eval.val_path and eval.train_path to images in one folder per class" in output
    paths = [f"eval.val_path={tmp_path}/nested", f"eval.train_path={tmp_path}/classes"]
    assert "evaluation: k-NN of 8 images" in start(*arguments, "name=b", *paths)
