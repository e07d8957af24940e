"""Recipes: named functions -> the settings that differ from the defaults, each with its receipt.

A receipt says where the settings come from, what accuracy was published for them (ImageNet-1k, k-NN / linear
top-1 of the teacher), on which hardware, and the command. What was not read in the paper or its code but
quoted by third parties is marked unverified.

The recipe auto is no function here, because its settings follow from the images and the devices: auto_recipe.py.

A recipe holds no addresses of images: `data.path` says what to train on, whatever the recipe. Where it is not set, the
demo draws its own images (`demo_data`).

The defaults that recipes build on are those of DINO's code. Learning rates are per 256 images, there as here:
the peak is base_lr * global_batch_size / 256. Two things differ: published runs used fp16 or fp32 (here
train.precision is auto, bf16 on a GPU), and the published k-NN votes with all 1,281,167 training images and
classifies all 50,000 others (here eval.max_train_images and eval.max_val_images bound both).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from dinoray.jobs.cli.auto_recipe import AUTO, as_tree, choose, typical
from dinoray.jobs.cli.domain_recipes import industrial, microscopy, pathology, satellite
from dinoray.models.config import TIMM, timm_name
from dinoray.pipeline.data.demo_images import demo_folder

Tree = dict[str, Any]


def demo() -> Tree:
    """A small ViT at 64 px, two DDP workers: minutes on a laptop. Without data.path it learns from drawn patterns.

    Differs from the published settings where 800 steps of 64 small images ask for it: blur in proportion to the
    crops, colour jitter strong enough that colour does not give an image away, batch norm in the head and a
    sharper teacher to leave the plateau of the first steps soon.

    Source: ours; accuracy before and after training over three seeds: benchmarks/RESULTS.md.
    Command: dinoray pretrain
    """
    return {
        "eval": {"every_steps": 270},
        "crops": {
            "global_crop_size": 64,
            "local_crop_size": 32,
            "local_crop_scale": [0.1, 0.4],
            "num_local_crops": 6,
            "saturation": 0.8,
            "hue": 0.5,
            "blur_sigma": [0.1, 0.6],
        },
        "backbone": {
            "name": "vit_tiny_patch16_224",
            "drop_path_rate": 0.0,
            "kwargs": {"embed_dim": 96, "depth": 3, "num_heads": 3},
        },
        "head": {"out_dim": 512, "hidden_dim": 512, "bottleneck_dim": 64, "use_bn": True},
        "loss": {"teacher_temp": 0.03},
        "teacher": {"final_teacher_momentum": 0.999},
        "optim": {
            "base_lr": 4e-3,
            "min_lr": 1e-5,
            "warmup_epochs": 1,
            "final_weight_decay": 0.04,
            "freeze_last_layer_epochs": 0,
        },
        "train": {"epochs": 24, "global_batch_size": 64},
        "checkpoint": {"every_steps": 100},
        "log": {"every_steps": 5},
        "resources": {"train_workers": 2, "augment_actors": 1},
    }


def photos_small() -> Tree:
    """ViT-Ti/16 at 96 px, 20 epochs: sizes for a few thousand photos.

    Differs from the published settings as `demo` does, and for its reasons, but keeps the published jitter: of
    photos, colour does tell something.

    Source: ours, sized for one machine; accuracy before and after training: benchmarks/RESULTS.md.
    Command: dinoray pretrain --recipe photos_small data.path=PHOTOS/train eval.val_path=PHOTOS/val
    """
    return {
        "eval": {"every_steps": 200},
        "crops": {
            "global_crop_size": 96,
            "local_crop_size": 48,
            "local_crop_scale": [0.1, 0.4],
            "num_local_crops": 6,
            "blur_sigma": [0.1, 0.9],
        },
        "backbone": {"name": "vit_tiny_patch16_224", "drop_path_rate": 0.0},
        "head": {"out_dim": 1024, "hidden_dim": 512, "bottleneck_dim": 64, "use_bn": True},
        "loss": {"teacher_temp": 0.03},
        "teacher": {"teacher_momentum": 0.99, "final_teacher_momentum": 0.999},
        "optim": {
            "base_lr": 2e-3,
            "min_lr": 1e-5,
            "warmup_epochs": 2,
            "final_weight_decay": 0.04,
            "freeze_last_layer_epochs": 0,
        },
        "train": {"epochs": 20, "global_batch_size": 64},
        "checkpoint": {"every_steps": 100},
    }


def vit_small_imagenet_vanilla() -> Tree:
    """ViT-S/16 with the published defaults: 100 epochs, batch 512.

    Source: DINO (arXiv 2104.14294), its code's default arguments and README ("vanilla").
    Published: k-NN 69.3, linear 74.0, 1.75 days on 8 GPUs.
    Command: dinoray pretrain --recipe vit_small_imagenet_vanilla data.path=s3://BUCKET/imagenet/train
    """
    return {
        "backbone": {"name": "vit_small_patch16_224"},
        "train": {"epochs": 100, "global_batch_size": 512},
        "resources": {"train_workers": 8},
    }


def vit_small_imagenet_boost() -> Tree:
    """ViT-S/16 longer and warmer: 300 epochs, batch 1024, teacher temperature 0.04 -> 0.07, free last layer.

    Source: the README of DINO's code ("boosting"), on its default 2 nodes of 8 GPUs by batch 64.
    Published: k-NN 73.3, linear 76.0, 2.6 days on 16 GPUs.
    Command: dinoray pretrain --recipe vit_small_imagenet_boost data.path=s3://BUCKET/imagenet/train
    """
    return {
        "backbone": {"name": "vit_small_patch16_224"},
        "head": {"norm_last_layer": False},
        "loss": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30},
        "train": {"epochs": 300, "global_batch_size": 1024},
        "resources": {"train_workers": 16},
    }


def vit_base_imagenet() -> Tree:
    """ViT-B/16 as released: 400 epochs, batch 1024, ten local crops.

    Source: args.txt of the released checkpoint as three independent projects quote it, alike; unverified at
    the source. Published (README of DINO's code): k-NN 76.1, linear 78.2; 32 GPUs by batch 32.
    Command: dinoray pretrain --recipe vit_base_imagenet data.path=s3://BUCKET/imagenet/train
    """
    return {
        "crops": {"num_local_crops": 10, "global_crop_scale": [0.25, 1.0], "local_crop_scale": [0.05, 0.25]},
        "backbone": {"name": "vit_base_patch16_224"},
        "loss": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 50},
        "optim": {"base_lr": 7.5e-4, "min_lr": 2e-6, "clip_grad": 0.3, "freeze_last_layer_epochs": 3},
        "train": {"epochs": 400, "global_batch_size": 1024},
        "resources": {"train_workers": 32},
    }


def resnet50_imagenet() -> Tree:
    """ResNet-50 as released: 800 epochs, batch 4080, LARS, batch norm in the head.

    Source: args.txt of the released checkpoint; its batch of 4080 over 80 GPUs is confirmed by DINO's author
    (issue 133 of its code), all else is as another project quotes it, unverified at the source.
    Published (README of DINO's code): k-NN 67.5, linear 75.3; 80 GPUs by batch 51.
    Command: dinoray pretrain --recipe resnet50_imagenet data.path=s3://BUCKET/imagenet/train
    """
    return {
        "crops": {"num_local_crops": 6, "global_crop_scale": [0.14, 1.0], "local_crop_scale": [0.05, 0.14]},
        # The released one is torchvision's, whose residual branches do not start at zero.
        "backbone": {"name": "resnet50", "drop_path_rate": 0.0, "kwargs": {"zero_init_last": False}},
        "head": {"out_dim": 60000, "use_bn": True},
        "loss": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 50},
        "optim": {
            "name": "lars",
            "base_lr": 0.3,
            "min_lr": 0.0048,
            "weight_decay": 1e-6,
            "final_weight_decay": 1e-6,
            "clip_grad": 0.0,
        },
        "train": {"epochs": 800, "global_batch_size": 4080},
        "resources": {"train_workers": 80},
    }


def adapt() -> Tree:
    """Continue from good weights, slowly: first fresh heads alone, then all of any backbone.

    `init.from=timm:NAME` also names the backbone. Patches of 14 px get crops that they divide. DINOv3's ViTs give their
    class token, which DINOv3 trains; timm averages patch tokens.

    Source: layer decay 0.9 and the patch embedding at 0.2 of the rate are defaults of DINOv2's code
    (ssl_default_config.yaml; DINOv3 has 0.2 as well); the teacher momentum of 0.999 and the weight decay of 0.04 are
    those of DINOv3's own adaptation (dinov3_vit7b16_high_res_adapt.yaml). The frozen stage of at least 1,000 steps and
    the peak of 5e-5 are quoted from the FINO branch of DINOv3's code, unverified at the source. Rate and momentum of
    the frozen stage are DINO's defaults; the epochs are ours. Toy experiment: benchmarks/adapt.py.
    Command: dinoray pretrain --recipe adapt data.path=PHOTOS init.from=timm:vit_small_patch14_dinov2.lvd142m
    """
    name = "vit_small_patch14_dinov2.lvd142m"
    return {
        "init": {"from": f"{TIMM}{name}", "load": "backbone", "freeze_steps": "auto"},
        "crops": {"local_crop_size": 98},
        "backbone": {"name": name, "drop_path_rate": 0.0},  # not every backbone has stochastic depth
        "head": {"out_dim": "auto"},
        "teacher": {"teacher_momentum": 0.999, "final_teacher_momentum": 0.999},
        "optim": {
            "base_lr": 5e-5,
            "warmup_epochs": 2,
            "final_weight_decay": 0.04,
            "freeze_last_layer_epochs": 0,
            "layer_decay": 0.9,
            "patch_embed_lr_scale": 0.2,
        },
        "train": {"epochs": 20, "global_batch_size": 256},
    }


def demo_data() -> Tree:
    """The images of the demo: where they are drawn, and their own validation set."""
    folder = demo_folder()
    return {
        "data": {"path": str(folder / "train"), "label_from_parent": True},
        "eval": {"val_path": str(folder / "val")},
    }


def backbone_of_start(recipe: str, settings: Mapping[str, Any]) -> str | None:
    """The backbone's name that the weights to start from decide: NAME of `init.from=timm:NAME`.

    None where `backbone.name` is set, or `init.from` is not or has no name in it. A file in place of the weights of
    `adapt` has the published ViT-S/16, until its own error says which backbone it fits.
    """
    init, backbone = settings.get("init"), settings.get("backbone")
    if not isinstance(init, Mapping) or (isinstance(backbone, Mapping) and "name" in backbone):
        return None
    start = init.get("from")
    if not isinstance(start, str):
        return None
    return timm_name(start) or ("vit_small_patch16_224" if recipe == adapt.__name__ else None)


def has_images(settings: Mapping[str, Any]) -> bool:
    """Whether the settings name images."""
    data = settings.get("data")
    return isinstance(data, Mapping) and ("path" in data or bool(data.get("mix")))


def with_backbone_of_start(recipe: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings, and the backbone's name that the weights to start from decide."""
    found, backbone = backbone_of_start(recipe, settings), settings.get("backbone") or {}
    return {**settings, "backbone": {**backbone, "name": found}} if found else settings


def starting_point(recipe: str, settings: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> Tree:
    """The recipe of this name for these settings. `chosen`: what auto has chosen for the images of a run; None: typical
    images on one GPU.

    The demo comes with its images unless `data.path` or `data.mix` is set. `init.from=timm:NAME` names the backbone,
    unless `backbone.name` is set. Where it differs from the recipe's, the recipe's `backbone.kwargs` are left out: they
    are arguments of another network.
    """
    found = backbone_of_start(recipe, settings)
    if recipe == AUTO:
        if chosen is None:
            chosen = as_tree(choose(typical(settings), with_backbone_of_start(recipe, settings)))
        return {**chosen, "backbone": {**chosen.get("backbone", {}), **({"name": found} if found else {})}}
    tree, backbone = RECIPES[recipe](), settings.get("backbone")
    own = tree["backbone"]["name"]
    if found:
        tree["backbone"]["name"] = found
    name = tree["backbone"]["name"]
    if isinstance(backbone, Mapping):
        name = backbone.get("name", name)
    if name != own:
        tree["backbone"].pop("kwargs", None)
    if recipe == adapt.__name__:
        if "patch14" not in str(name):
            del tree["crops"]
        if re.match(r"vit_\w+_dinov3", str(name)):
            tree["backbone"]["kwargs"] = {"global_pool": "token"}
    if recipe == demo.__name__ and not has_images(settings):
        for section, values in demo_data().items():
            tree[section] = {**tree.get(section, {}), **values}
    return tree


RECIPES: dict[str, Callable[[], Tree]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        photos_small,
        vit_small_imagenet_vanilla,
        vit_small_imagenet_boost,
        vit_base_imagenet,
        resnet50_imagenet,
        pathology,
        satellite,
        microscopy,
        industrial,
        adapt,
    )
}
"""Name -> recipe."""
RECIPE_NAMES = (*RECIPES, AUTO)
"""What `--recipe` takes."""
