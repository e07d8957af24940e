"""Recipes against what was published: every argument, the schedule that comes of it, and the receipt."""

import re
import shlex
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from paths import SHARED

from dinoray.jobs.cli.arguments import Arguments
from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.models.backbone import build_backbone, embed_dim
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.partition import batch_size_per_worker
from dinoray.pipeline.training.config import Schedule
from dinoray.pipeline.worker.config import Config

NUM_IMAGES = 1_281_167
"""Training images of ImageNet-1k."""
PHOTOS = SHARED / "photos-small"
IMAGENET = [
    "vit_small_imagenet_vanilla",
    "vit_small_imagenet_boost",
    "vit_base_imagenet",
    "resnet50_imagenet",
]
DOMAINS = ["pathology", "satellite", "microscopy", "industrial"]


def config_of(recipe: str) -> Config:
    return load_config(recipe, None, ["data.path=/data"])


# The arguments of DINO's code, by its own names, with its defaults (ViT-S/16, "vanilla", 8 GPUs).
VANILLA: dict[str, Any] = {
    "arch": "vit_small",
    "patch_size": 16,
    "out_dim": 65536,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "use_bn_in_head": False,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "batch_size_per_gpu": 64,
    "epochs": 100,
    "freeze_last_layer": 1,
    "lr": 0.0005,
    "warmup_epochs": 10,
    "min_lr": 1e-6,
    "optimizer": "adamw",
    "drop_path_rate": 0.1,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_number": 8,
    "local_crops_scale": (0.05, 0.4),
    "world_size": 8,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "vit_small_imagenet_vanilla": VANILLA,
    "vit_small_imagenet_boost": VANILLA
    | {
        "epochs": 300,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
        "world_size": 16,
    },
    "vit_base_imagenet": VANILLA
    | {
        "arch": "vit_base",
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 50,
        "clip_grad": 0.3,
        "batch_size_per_gpu": 32,
        "epochs": 400,
        "freeze_last_layer": 3,
        "lr": 0.00075,
        "min_lr": 2e-6,
        "global_crops_scale": (0.25, 1.0),
        "local_crops_scale": (0.05, 0.25),
        "local_crops_number": 10,
        "world_size": 32,
    },
    "resnet50_imagenet": VANILLA
    | {
        "arch": "resnet50",
        "patch_size": None,
        "drop_path_rate": 0.0,
        "out_dim": 60000,
        "use_bn_in_head": True,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 50,
        "weight_decay": 1e-6,
        "weight_decay_end": 1e-6,
        "clip_grad": 0.0,
        "batch_size_per_gpu": 51,
        "epochs": 800,
        "lr": 0.3,
        "min_lr": 0.0048,
        "global_crops_scale": (0.14, 1.0),
        "local_crops_scale": (0.05, 0.14),
        "local_crops_number": 6,
        "optimizer": "lars",
        "world_size": 80,
    },
}


def in_published_words(config: Config) -> dict[str, Any]:
    """A config as the arguments of DINO's code."""
    network = re.fullmatch(r"(vit_small|vit_base|resnet50)(?:_patch(\d+)_224)?", config.backbone.name)
    assert network
    return {
        "arch": network[1],
        "patch_size": int(network[2]) if network[2] else None,
        "out_dim": config.head.out_dim,
        "norm_last_layer": config.head.norm_last_layer,
        "momentum_teacher": config.teacher.teacher_momentum,
        "use_bn_in_head": config.head.use_bn,
        "warmup_teacher_temp": config.loss.warmup_teacher_temp,
        "teacher_temp": config.loss.teacher_temp,
        "warmup_teacher_temp_epochs": config.loss.warmup_teacher_temp_epochs,
        "weight_decay": config.optim.weight_decay,
        "weight_decay_end": config.optim.final_weight_decay,
        "clip_grad": config.optim.clip_grad,
        "batch_size_per_gpu": config.train.global_batch_size / config.resources.train_workers,
        "epochs": config.train.epochs,
        "freeze_last_layer": config.optim.freeze_last_layer_epochs,
        "lr": config.optim.base_lr,
        "warmup_epochs": config.optim.warmup_epochs,
        "min_lr": config.optim.min_lr,
        "optimizer": config.optim.name,
        "drop_path_rate": config.backbone.drop_path_rate,
        "global_crops_scale": config.crops.global_crop_scale,
        "local_crops_number": config.crops.num_local_crops,
        "local_crops_scale": config.crops.local_crop_scale,
        "world_size": config.resources.train_workers,
    }


@pytest.mark.parametrize("recipe", IMAGENET)
def test_a_recipe_has_every_published_argument(recipe: str) -> None:
    assert in_published_words(config_of(recipe)) == PUBLISHED[recipe]


@pytest.mark.parametrize("recipe", IMAGENET)
def test_what_the_published_code_does_not_let_one_choose_is_as_it_has_it(recipe: str) -> None:
    config = config_of(recipe)
    assert (config.crops.num_global_crops, config.crops.global_crop_size, config.crops.local_crop_size) == (
        2,
        224,
        96,
    )
    assert (config.crops.global_blur_prob, config.crops.local_blur_prob) == ((1.0, 0.1), 0.5)
    assert (config.crops.global_solarize_prob, config.crops.local_solarize_prob) == ((0.0, 0.2), 0.0)
    assert (config.crops.flip_prob, config.crops.jitter_prob, config.crops.gray_prob) == (0.5, 0.8, 0.2)
    assert (config.crops.brightness, config.crops.contrast, config.crops.saturation, config.crops.hue) == (
        *(0.4, 0.4, 0.2),
        0.1,
    )
    assert (config.crops.blur_sigma, config.crops.aspect_ratio) == ((0.1, 2.0), (3 / 4, 4 / 3))
    assert (config.head.hidden_dim, config.head.bottleneck_dim, config.head.num_layers) == (2048, 256, 3)
    assert (config.loss.student_temp, config.loss.center_momentum) == (0.1, 0.9)
    assert (config.teacher.final_teacher_momentum, config.optim.momentum) == (1.0, 0.9)


@dataclass
class Hand:
    """Numbers of a schedule worked out by hand for 1,281,167 images."""

    total_steps: int
    warmup_steps: int
    freeze_steps: int
    peak_lr: float
    temps: dict[int, float]


HAND = {
    # 100 * 1281167 / 512 = 250,227.9; 10 epochs are 25,022.8 steps, one is 2,502.3; 5e-4 * 512 / 256
    "vit_small_imagenet_vanilla": Hand(250_227, 25_023, 2_502, 0.001, {0: 0.04, 50: 0.04}),
    # 300 * 1281167 / 1024 = 375,341.9; 12,511.4; 1,251.1; 5e-4 * 4
    "vit_small_imagenet_boost": Hand(375_341, 12_511, 1_251, 0.002, {0: 0.04, 29: 0.07, 200: 0.07}),
    # 400 * 1281167 / 1024 = 500,455.9; 12,511.4; 3 epochs are 3,753.4; 7.5e-4 * 4
    "vit_base_imagenet": Hand(500_455, 12_511, 3_753, 0.003, {0: 0.04, 7: 0.04 + 0.03 / 7, 49: 0.07}),
    # 800 * 1281167 / 4080 = 251,209.2; 3,140.1; 314.01; 0.3 * 4080 / 256
    "resnet50_imagenet": Hand(251_209, 3_140, 314, 4.78125, {0: 0.04, 7: 0.04 + 0.03 / 7, 49: 0.07}),
}


@pytest.mark.parametrize("recipe", IMAGENET)
def test_the_schedule_on_imagenet_is_the_one_worked_out_by_hand(recipe: str) -> None:
    config, hand = config_of(recipe), HAND[recipe]
    schedule = Schedule(config, num_images=NUM_IMAGES)
    assert schedule.total_steps == hand.total_steps
    assert schedule.warmup_steps == hand.warmup_steps

    lrs = [schedule.at(step).lr for step in range(0, hand.total_steps, 101)]
    peak = schedule.at(hand.warmup_steps - 1).lr
    assert peak == pytest.approx(hand.peak_lr)
    assert max(lrs) <= peak * (1 + 1e-9)
    assert schedule.at(0).lr == 0
    end = schedule.at(hand.total_steps)
    assert end.lr == pytest.approx(PUBLISHED[recipe]["min_lr"])
    assert end.weight_decay == pytest.approx(PUBLISHED[recipe]["weight_decay_end"])
    assert end.teacher_momentum == 1.0
    assert schedule.at(0).weight_decay == pytest.approx(PUBLISHED[recipe]["weight_decay"])
    assert schedule.at(0).teacher_momentum == pytest.approx(0.996)

    assert schedule.at(hand.freeze_steps - 1).freeze_last_layer
    assert not schedule.at(hand.freeze_steps).freeze_last_layer
    for epoch, temp in hand.temps.items():
        first_step = -(-epoch * NUM_IMAGES // config.train.global_batch_size)
        assert schedule.epoch(first_step) == epoch
        assert schedule.at(first_step).teacher_temp == pytest.approx(temp)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_divides_its_batch_among_its_workers(recipe: str) -> None:
    config = config_of(recipe)
    share = batch_size_per_worker(config.train.global_batch_size, config.resources.train_workers)
    assert share * config.resources.train_workers == config.train.global_batch_size


@pytest.mark.parametrize("recipe", RECIPES)
def test_warm_ups_of_a_recipe_end_within_its_run(recipe: str) -> None:
    config = config_of(recipe)
    assert config.optim.warmup_epochs < config.train.epochs
    assert config.loss.warmup_teacher_temp_epochs < config.train.epochs


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_nothing_to_its_default(recipe: str) -> None:
    """A recipe holds what differs, so that it reads as a list of choices."""
    plain = load_config("vit_small_imagenet_vanilla", None, ["data.path=/data"])
    defaults = dict(
        flatten(type(plain)(recipe="x", name="x", data={"path": "/data"}).model_dump(mode="json"))
    )
    repeated = {k for k, v in flatten(RECIPES[recipe]()) if defaults.get(k) == v}
    # What a recipe is about may be said aloud.
    assert repeated <= {
        "backbone.name",
        "train.epochs",
        "train.global_batch_size",
        "loss.warmup_teacher_temp",
    }


# Millions of parameters as published, and the width of the features.
NETWORKS = {
    "vit_small_imagenet_vanilla": (21, 384),
    "vit_small_imagenet_boost": (21, 384),
    "vit_base_imagenet": (85, 768),
    "resnet50_imagenet": (23, 2048),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_network_of_a_recipe_takes_its_crops_and_has_the_published_size(recipe: str) -> None:
    config = config_of(recipe)
    sizes = (config.crops.global_crop_size, config.crops.local_crop_size)
    with torch.device("meta"):
        backbone = build_backbone(config.backbone, crop_sizes=sizes, drop_path_rate=0.0)
        features = [backbone(torch.zeros(1, 3, size, size)) for size in sizes]
    assert [f.shape for f in features] == [(1, embed_dim(backbone))] * 2
    if recipe in NETWORKS:
        millions = sum(p.numel() for p in backbone.parameters()) // 1_000_000
        assert (millions, embed_dim(backbone)) == NETWORKS[recipe]


def test_the_resnet_starts_as_torchvisions_does() -> None:
    backbone = build_backbone(config_of("resnet50_imagenet").backbone, crop_sizes=(64,), drop_path_rate=0.0)
    ends = [weight for name, weight in backbone.named_parameters() if name.endswith("bn3.weight")]
    assert len(ends) == 16
    assert all(weight.mean() == 1 for weight in ends)  # timm's own start at 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_a_receipt(recipe: str) -> None:
    receipt = " ".join((RECIPES[recipe].__doc__ or "").split())
    assert "Source: " in receipt
    assert ("Published: k-NN " in receipt or "Published (README of DINO's code): k-NN " in receipt) == (
        recipe in IMAGENET
    )
    unverified = ("vit_base_imagenet", "resnet50_imagenet", "adapt", "pathology")
    assert ("unverified" in receipt.lower()) == (recipe in unverified)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_on_a_receipt_runs_the_recipe(recipe: str) -> None:
    command = re.search(r"Command: dinoray pretrain(.*)", RECIPES[recipe].__doc__ or "")
    assert command
    arguments = Arguments("pretrain", "", Config).parse_args(shlex.split(command[1]))
    assert load_config(arguments.recipe, arguments.config, arguments.overrides).recipe == recipe


def test_the_recipes_are_these() -> None:
    assert list(RECIPES) == ["demo", "photos_small", *IMAGENET, *DOMAINS, "adapt"]


@pytest.mark.parametrize("recipe", DOMAINS)
@pytest.mark.parametrize("channels", [1, 5])
def test_a_recipe_of_a_domain_takes_the_channels_that_its_images_have(recipe: str, channels: int) -> None:
    overrides = ["data.path=/data", f"data.channels={channels}"]
    if recipe != "pathology":  # whose stains need RGB
        assert load_config(recipe, None, overrides).crops.channels == channels
        return
    with pytest.raises(ConfigError, match=r"hed_jitter=0.05 must be 0 .* crops\.hed_jitter=0") as refused:
        load_config(recipe, None, overrides)
    remedy = re.findall(r"crops\.\w+=0\b", str(refused.value).partition("set ")[2])
    assert load_config(recipe, None, [*overrides, *remedy]).crops.channels == channels


def test_a_recipe_is_made_anew_each_time() -> None:
    for recipe in RECIPES.values():
        recipe()["backbone"]["name"] = "other"
        assert recipe()["backbone"]["name"] != "other"


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the shared sample data is not here")
def test_photos_small_takes_parquet_whose_columns_it_does_not_name() -> None:
    config = load_config("photos_small", None, [f"data.path={PHOTOS / 'train'}"])
    manifest = build_manifest(config.data)
    assert manifest.kind == "parquet"
    found = manifest.settle(config.data)
    assert (found.image_column, found.key_column, found.label_column) == ("image", "key", "label")
    assert manifest.num_images > 2000
