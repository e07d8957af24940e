"""Recipes: named functions -> the settings that differ from the defaults, each with its receipt.

A recipe derives from another by calling it. Receipts say where the settings come from, what accuracy was
published for them (ImageNet-1k, k-NN / linear top-1 of the teacher), on which hardware, and the command.
Settings marked unverified were not stated in the paper or its code; they are recalled by third parties.
"""

from collections.abc import Callable
from typing import Any

from pipeline.demo_images import demo_folder

Tree = dict[str, Any]


def demo() -> Tree:
    """Twelve classes of drawn patterns, a small ViT at 64 px, two DDP workers: minutes on a laptop, no downloads.

    Source: ours; its accuracy before and after training stands in benchmarks/RESULTS.md.
    Command: python -m jobs.pretrain
    """
    folder = demo_folder()
    return {
        "data": {"path": str(folder / "train"), "label_from_parent": True},
        "eval": {"val_path": str(folder / "val"), "every_steps": 100},
        "crops": {"global_crop_size": 64, "local_crop_size": 32, "num_local_crops": 6},
        "backbone": {
            "name": "vit_tiny_patch16_224",
            "drop_path_rate": 0.0,
            "kwargs": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
        },
        "head": {"out_dim": 1024, "hidden_dim": 512, "bottleneck_dim": 128},
        "teacher": {"teacher_momentum": 0.99},
        "optim": {
            "base_lr": 2e-3,
            "warmup_epochs": 1,
            "final_weight_decay": 0.04,
            "freeze_last_layer_epochs": 0,
        },
        "train": {"epochs": 10, "global_batch_size": 64},
        "checkpoint": {"every_steps": 100},
        "log": {"every_steps": 5},
        "resources": {"train_workers": 2, "augment_actors": 1},
    }


def photos_small() -> Tree:
    """ViT-Ti/16 at 96 px for a few thousand small photos in Parquet (columns image, key, label); set data.path.

    Source: ours, sized for one CPU machine.
    Command: python -m jobs.pretrain --recipe photos_small data.path=PHOTOS/train eval.val_path=PHOTOS/val
    """
    return {
        "data": {"key_column": "key", "label_column": "label"},
        "eval": {"every_steps": 200},
        "crops": {"global_crop_size": 96, "local_crop_size": 48, "num_local_crops": 6},
        "backbone": {"name": "vit_tiny_patch16_224", "drop_path_rate": 0.0},
        "head": {"out_dim": 1024, "hidden_dim": 512, "bottleneck_dim": 128},
        "teacher": {"teacher_momentum": 0.99},
        "optim": {
            "base_lr": 1e-3,
            "warmup_epochs": 2,
            "final_weight_decay": 0.04,
            "freeze_last_layer_epochs": 0,
        },
        "train": {"epochs": 20, "global_batch_size": 64},
        "checkpoint": {"every_steps": 100},
    }


def vit_small_imagenet_vanilla() -> Tree:
    """ViT-S/16 with the published defaults: 100 epochs, batch 512.

    Source: DINO (arXiv 2104.14294) and the README of its code. Published: k-NN 69.3, linear 74.0,
    1.75 days on 8 V100.
    Command: python -m jobs.pretrain --recipe vit_small_imagenet_vanilla data.path=s3://BUCKET/imagenet/train
    """
    return {
        "backbone": {"name": "vit_small_patch16_224"},
        "train": {"epochs": 100, "global_batch_size": 512},
        "resources": {"train_workers": 8},
    }


def vit_small_imagenet_boost() -> Tree:
    """ViT-S/16 longer and warmer: 300 epochs, batch 1024, teacher temperature 0.04 -> 0.07, free last layer.

    Source: the README of DINO's code ("boosting"). Published: k-NN 73.3, linear 76.0, 2.6 days on 16 V100.
    Command: python -m jobs.pretrain --recipe vit_small_imagenet_boost data.path=s3://BUCKET/imagenet/train
    """
    return {
        "backbone": {"name": "vit_small_patch16_224"},
        "head": {"norm_last_layer": False},
        "loss": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30},
        "train": {"epochs": 300, "global_batch_size": 1024},
        "resources": {"train_workers": 16},
    }


def vit_base_imagenet() -> Tree:
    """ViT-B/16 as released: 400 epochs, batch 1024, ten local crops. Settings unverified, accuracy published.

    Source: the released checkpoint's settings as third parties recall them. Published: k-NN 76.1, linear 78.2
    (2 x 16 GPUs by batch 32 each).
    Command: python -m jobs.pretrain --recipe vit_base_imagenet data.path=s3://BUCKET/imagenet/train
    """
    return {
        "crops": {"num_local_crops": 10, "global_crop_scale": [0.25, 1.0], "local_crop_scale": [0.05, 0.25]},
        "backbone": {"name": "vit_base_patch16_224"},
        "loss": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 50},
        # Published as the peak at its batch: 7.5e-4 by 256 images, scaled linearly.
        "optim": {"base_lr": 7.5e-4, "min_lr": 2e-6, "clip_grad": 0.3, "freeze_last_layer_epochs": 3},
        "train": {"epochs": 400, "global_batch_size": 1024},
        "resources": {"train_workers": 16},
    }


def resnet50_imagenet() -> Tree:
    """ResNet-50 as released: 800 epochs, batch 4080, LARS, batch norm in the head. Settings unverified in part.

    Source: the released checkpoint's settings as third parties recall them, and discussion of DINO's code.
    Published: k-NN 67.5, linear 75.3 (80 GPUs by batch 51 each).
    Command: python -m jobs.pretrain --recipe resnet50_imagenet data.path=s3://BUCKET/imagenet/train
    """
    return {
        "crops": {"num_local_crops": 6, "global_crop_scale": [0.14, 1.0], "local_crop_scale": [0.05, 0.14]},
        "backbone": {"name": "resnet50", "drop_path_rate": 0.0},
        "head": {"out_dim": 60000, "use_bn": True},
        "optim": {
            "name": "lars",
            "base_lr": 0.3,
            "min_lr": 0.0048,
            "weight_decay": 1e-6,
            "final_weight_decay": 1e-6,
        },
        "train": {"epochs": 800, "global_batch_size": 4080},
        "resources": {"train_workers": 80},
    }


RECIPES: dict[str, Callable[[], Tree]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        photos_small,
        vit_small_imagenet_vanilla,
        vit_small_imagenet_boost,
        vit_base_imagenet,
        resnet50_imagenet,
    )
}
"""Name -> recipe."""
