"""`init.from` on command lines and in files: its former name, the backbone that it names, and the recipe adapt."""

from pathlib import Path

import pytest
import yaml

from dinoray.jobs.cli.arguments import PretrainArguments
from dinoray.jobs.cli.config import load_config, load_run_config
from dinoray.jobs.cli.print_config import describe_config
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.config import Config

DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"


def config_of(*overrides: str, recipe: str = "adapt", file: Path | None = None) -> Config:
    return load_config(recipe, file, ["data.path=/data", *overrides])


def test_weights_of_timm_name_the_backbone_and_its_crops() -> None:
    config = config_of(f"init.from=timm:{DINOV2}")
    assert (config.backbone.name, config.crops.local_crop_size) == (DINOV2, 98)
    config = config_of("init.from=timm:convnext_small.dinov3_lvd1689m")
    assert (config.backbone.name, config.crops.local_crop_size) == ("convnext_small.dinov3_lvd1689m", 96)
    config = config_of("init.from=timm:vit_small_plus_patch16_dinov3.lvd1689m")
    assert config.backbone.kwargs == {"global_pool": "token"}
    demo = config_of("init.from=timm:resnet50", recipe="demo")
    assert (demo.backbone.name, demo.backbone.kwargs) == ("resnet50", {})


def test_backbone_that_is_set_is_not_named_by_the_weights() -> None:
    config = config_of(f"init.from=timm:{DINOV2}", "backbone.name=resnet50")
    assert (config.backbone.name, config.crops.local_crop_size) == ("resnet50", 96)
    assert config_of("init.from=/dino.pth").backbone.name == "vit_small_patch16_224"
    assert config_of("init.from=/dino.pth", recipe="demo").backbone.name == "vit_tiny_patch16_224"


def test_source_of_the_backbone_is_printed() -> None:
    arguments = PretrainArguments().parse_args(["data.path=/data", f"init.from=timm:{DINOV2}"])
    lines = [line.strip() for line in describe_config(Config, arguments).splitlines()]
    assert f"name: {DINOV2}  # init.from" in lines
    assert f"from: timm:{DINOV2}  # command line" in lines


def test_former_name_of_the_setting_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    tree = yaml.safe_load(config_of("init.from=/w.pth", recipe="demo").to_yaml())
    assert tree["init"].pop("from") == "/w.pth"
    file.write_text(yaml.safe_dump(tree | {"init": {**tree["init"], "path": "/w.pth"}}))
    for config in (
        config_of("init.path=/w.pth"),
        config_of(file=file),
        load_run_config(Directory(str(tmp_path))),
    ):
        assert config.init.path == "/w.pth"
    assert config_of("init.from=/other.pth", file=file).init.path == "/other.pth"


@pytest.mark.parametrize("recipe", ["demo", "adapt"])
def test_settings_of_the_frozen_stage_are_part_of_what_is_learnt(recipe: str) -> None:
    learnt = config_of(recipe=recipe).algorithm().init
    assert learnt.freeze_steps == ("auto" if recipe == "adapt" else 0)
    assert learnt.model_dump().keys() == {"freeze_steps", "freeze_base_lr", "freeze_teacher_momentum"}
