"""The recipe auto as a pure function: golden lines of reasons, and what follows from settings of the user."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dinoray.jobs.cli.auto_facts import Facts, choice_lines
from dinoray.jobs.cli.auto_recipe import AUTO, TYPICAL, as_tree, choose
from dinoray.jobs.cli.config import apply_overrides, load, load_config
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.partition import batch_size_per_worker
from dinoray.pipeline.worker.config import Config

LAPTOP = {"width": 500, "height": 375, "cpus": 2}
CARD = {"width": 500, "height": 375, "gpus": 1, "gpu_bytes": 24 * 10**9, "cpus": 16}
NODE = {"width": 500, "height": 375, "gpus": 8, "gpu_bytes": 80 * 10**9, "cpus": 96}


def settings(*overrides: str) -> dict[str, Any]:
    return apply_overrides({}, ["data.path=/x", *overrides])


def chosen(facts: Facts, *overrides: str) -> dict[str, Any]:
    return {choice.key: choice.value for choice in choose(facts, settings(*overrides))}


def config_of(facts: Facts, *overrides: str) -> Config:
    tree = as_tree(choose(facts, settings(*overrides)))
    return load(Config, AUTO, None, ["data.path=/x", *overrides], looks=True, chosen=tree)


def lines(facts: Facts, *overrides: str) -> str:
    return "\n".join(choice_lines(choose(facts, settings(*overrides))))


def test_lines_for_seven_images_on_a_laptop() -> None:
    assert lines(Facts(7, **LAPTOP)) == (
        "backbone.name=resnet10t: 7 images and no GPU; of the networks that CPUs train in minutes it learned most\n"
        "backbone.kwargs={channels: [32, 64, 128, 256], stem_width: 16}: 7 images and no GPU; half the width\n"
        "backbone.drop_path_rate=0: a convolutional network; stochastic depth is for ViTs on 10,000 images and more\n"
        "crops.global_crop_size=48: no GPU; small crops are what CPUs train on in minutes\n"
        "crops.num_local_crops=0: global crops of 48 pixels; local crops of 3/7 of that show too little\n"
        "crops.global_crop_scale=[0.2, 1]: no local crops; global crops show details too\n"
        "crops.blur_sigma=[0.1, 0.43]: 2 pixels at 224, in proportion to 48\n"
        "crops.hue=0.05 crops.gray_prob=0.1: 7 images; below 20,000 colours are changed less\n"
        "train.global_batch_size=2: 7 images; at most a quarter of them, so that batches differ\n"
        "train.epochs=286: 7 images; about 100,000 images for each of 2 CPU cores, at most 200 epochs, and at least "
        "1,000 steps\n"
        "optim.base_lr=0.04: batch 2; a peak of 0.00031: 1e-3 at a batch of 512, to the cube root below, "
        "twice that for a network of half the width\n"
        "optim.warmup_epochs=10: 286 epochs; a tenth, at most 10, and at least 10 steps of them\n"
        "optim.final_weight_decay=0.04: 7 images; below 20,000 the weight decay stays what it is at the start\n"
        "optim.freeze_last_layer_epochs=0: 7 images; below 20,000 the prototypes train from the first step\n"
        "head.out_dim=512: 7 images; the power of 2 nearest to a prototype for each 16, 512 to 65536\n"
        "head.use_bn=false: batch 2; the statistics of fewer than 16 images are noise\n"
        "head.hidden_dim=512 head.bottleneck_dim=64: a network of half the width; a head of 2048 would "
        "take longer than the network\n"
        "loss.warmup_teacher_temp_epochs=0: 7 images; none up to 20,000: 0.05 is safe at once\n"
        "loss.teacher_temp=0.05: 7 images; 0.05 up to 20,000, where 0.03 is too sharp, 0.07 from 1,000,000 on\n"
        "loss.center_momentum=0.99: batch 2; 0.9 from 64 on, slower below, so that the centre is the mean of more "
        "images\n"
        "teacher.teacher_momentum=0.98002: batch 2, 1,001 steps; 0.996 from a batch of 512 on, slower in proportion "
        "below, but within a twentieth of the run, at least 0.98\n"
        "teacher.final_teacher_momentum=0.999: 1,001 steps; 0.999 below 10,000, where a teacher at rest would miss the "
        "last of them\n"
        "eval.every_steps=201 checkpoint.every_steps=201: 1,001 steps; five times in the run"
    )


GOLDEN = {
    "70, labels, laptop": (
        Facts(70, num_classes=7, **LAPTOP),
        [
            "train.global_batch_size=16: 70 images; at most a quarter of them, so that batches differ",
            "optim.base_lr=0.01: batch 16; a peak of 0.00063: 1e-3 at a batch of 512, to the cube root "
            "below, twice that for a network of half the width",
            "head.use_bn=true: a convolutional network; batch norm leaves the plateau of the first steps soon",
            "loss.center_momentum=0.975: batch 16; 0.9 from 64 on, slower below, so that the centre is "
            "the mean of more images",
            "eval.k=[2]: 7 classes of about 10 images; as many neighbours as a fifth of them",
        ],
    ),
    "700, gray, one GPU": (
        Facts(700, channels=1, **CARD),
        [
            "backbone.name=resnet18: 700 images and 1 GPU; below 10,000 images a convolutional network learns "
            "more than a ViT",
            "crops.global_crop_size=128 crops.num_local_crops=6: as in lightly's benchmarks of ResNets",
            "crops.local_crop_size=64: 3/7 of the global crops' 128 pixels, as published",
            "crops.saturation=0 crops.hue=0 crops.gray_prob=0: images of 1 channel; gray stays gray "
            "whatever its hue and saturation",
            "train.global_batch_size=128: 700 images; at most a quarter of them, so that batches differ",
            "resources.train_workers=1: 1 GPU, 128 images of the batch on each",
        ],
    ),
    "7,000, labels, eight GPUs": (
        Facts(7_000, num_classes=20, **NODE),
        [
            "train.global_batch_size=256: 8 GPUs; usual for resnet18",
            "resources.train_workers=8: 8 GPUs, 32 images of the batch on each",
            "train.epochs=200: 7,000 images; 200 below 100,000 images, 100 from there on",
            "teacher.teacher_momentum=0.996342: batch 256, 5,468 steps; 0.996 from a batch of 512 on, slower in "
            "proportion below, but within a twentieth of the run, at least 0.99",
        ],
    ),
    "70, eight GPUs": (
        Facts(70, **NODE),
        ["resources.train_workers=1: 8 GPUs, but batch 16; 16 images of it on each of 1"],
    ),
    "12,000, one GPU of 24 GB": (
        Facts(12_000, **CARD),
        [
            "backbone.name=vit_small_patch16_224: 12,000 images and 1 GPU; DINO's usual network; a ViT-B is for "
            "1,000,000 images and 8 GPUs",
            "crops.global_crop_size=224 crops.num_local_crops=8: as published for ViTs",
            "train.global_batch_size=64: 1 GPU of 24 GB; 64 images fit each",
        ],
    ),
    "2,000,000, eight GPUs": (
        Facts(2_000_000, **NODE),
        [
            "backbone.name=vit_base_patch16_224: 2,000,000 images and 8 GPUs; enough of both for a ViT-B: "
            "1,000,000 and 8",
            "head.use_bn=false: a ViT on 2,000,000 images; as published, 69.7 % k-NN against 68.6 %",
            "loss.warmup_teacher_temp_epochs=30: 2,000,000 images; 30 % of 100 epochs",
            "loss.teacher_temp=0.07: 2,000,000 images; 0.05 up to 20,000, where 0.03 is too sharp, 0.07 from 1,000,000 "
            "on",
        ],
    ),
    "small images, one GPU": (
        Facts(50_000, width=32, height=32, gpus=1),
        [
            "backbone.name=resnet18: 50,000 images and 1 GPU; images of 32 pixels have too few patches of 16 for a ViT",
            "crops.global_crop_size=32: images of 32 pixels (shorter side)",
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_lines_for(name: str) -> None:
    facts, expected = GOLDEN[name]
    found = lines(facts).splitlines()
    assert [
        line for line in found if line.partition("=")[0] in {one.partition("=")[0] for one in expected}
    ] == expected


def test_without_labels_the_number_of_neighbours_is_left_alone() -> None:
    assert "eval.k" not in chosen(Facts(70, **LAPTOP))
    assert "eval.k" not in chosen(Facts(7_000, num_classes=20, **LAPTOP))


def test_the_facts_are_a_line() -> None:
    assert Facts(1, channels=1).line == "1 image, 1 channel; no GPU, 1 CPU core"
    line = "2,853 images of 170 x 128 pixels (median), 3 channels, 20 classes; 2 GPUs of 24 GB, 8 CPU cores"
    assert Facts(2853, 170, 128, 3, 20, 2, 24 * 10**9, 8).line == line


def test_a_setting_of_the_user_wins_and_the_rest_follows() -> None:
    facts = Facts(2_853, 170, 128, cpus=2)
    plain, mine = (chosen(facts, *overrides) for overrides in ([], ["train.global_batch_size=256"]))
    assert "train.global_batch_size" not in mine
    assert (plain["optim.base_lr"], mine["optim.base_lr"]) == (0.004, 0.0016)
    assert (plain["teacher.teacher_momentum"], mine["teacher.teacher_momentum"]) == (0.99359, 0.98)
    config = config_of(facts, "train.global_batch_size=256", "train.epochs=5")
    assert (config.train.global_batch_size, config.train.epochs, config.optim.warmup_epochs) == (256, 5, 0.9)


def test_a_network_of_the_user_gets_crops_in_whole_patches_and_no_arguments_of_ours() -> None:
    config = config_of(Facts(2_853, **CARD), "backbone.name=vit_small_patch14_dinov2")
    assert (config.crops.global_crop_size, config.crops.local_crop_size) == (224, 98)
    assert config.backbone.kwargs == {}
    laptop = config_of(Facts(2_853, **LAPTOP), "backbone.name=resnet50")
    assert (laptop.crops.global_crop_size, laptop.backbone.kwargs, laptop.head.hidden_dim) == (48, {}, 2048)
    assert config_of(Facts(70, **LAPTOP), "backbone.kwargs.depth=2").backbone.name == "vit_tiny_patch16_224"


def test_settings_about_the_devices_are_heeded() -> None:
    assert chosen(Facts(7_000, **NODE), "resources.use_gpu=false")["backbone.name"] == "resnet10t"
    waiting = chosen(Facts(7_000, **LAPTOP), "resources.use_gpu=true", "resources.train_workers=3")
    assert waiting["backbone.name"] == "resnet18"
    assert waiting["train.global_batch_size"] == 255
    assert "resources.train_workers" not in waiting


def test_settings_of_the_loss_stay_consistent() -> None:
    many = Facts(2_000_000, **NODE)
    assert config_of(many, "loss.teacher_temp=0.03").loss.warmup_teacher_temp == 0.03
    warm = ["loss.warmup_teacher_temp=0.06", "loss.warmup_teacher_temp_epochs=2"]
    assert config_of(Facts(70, **LAPTOP), *warm).loss.teacher_temp == 0.06
    assert config_of(Facts(7, **LAPTOP), "loss.centering=sinkhorn_knopp").loss.center_momentum == 0.9
    assert config_of(Facts(7, **LAPTOP), "optim.name=lars").optim.base_lr == 0.3


@hypothesis_settings(max_examples=40)
@given(
    st.integers(2, 10**8),
    st.integers(0, 4000),
    st.sampled_from([1, 3]),
    st.integers(0, 40),
    st.sampled_from([0, 8 * 10**9, 80 * 10**9]),
    st.sampled_from(
        [(), ("train.global_batch_size=96",), ("resources.train_workers=3",), ("train.epochs=0.5",)]
    ),
)
def test_the_choices_are_a_config_that_can_run(
    num_images: int, side: int, channels: int, gpus: int, gpu_bytes: int, overrides: tuple[str, ...]
) -> None:
    config = config_of(Facts(num_images, side, side, channels, 0, gpus, gpu_bytes, 4), *overrides)
    batch_size_per_worker(config.train.global_batch_size, config.resources.most_workers)
    assert config.train.global_batch_size <= max(num_images, 96, 3)
    assert config.crops.global_crop_size <= max(side or 224, 32)
    assert config.optim.warmup_epochs <= config.train.epochs / 2


def test_a_wrong_value_is_named_and_does_not_stop_the_choice() -> None:
    wrong = ["train.global_batch_size=many", "train.epochs=-1", "crops=3", "optim.lrr=1"]
    with pytest.raises(ConfigError) as error:
        config_of(TYPICAL, *wrong)
    assert sorted(line.partition("=")[0] for line in str(error.value).splitlines()) == [
        "crops",
        "optim.lrr",
        "train.epochs",
        "train.global_batch_size",
    ]


def test_a_command_that_does_not_look_refuses_auto_and_takes_what_it_has_chosen() -> None:
    with pytest.raises(ConfigError, match=r"^recipe=auto looks at the images.*--print-config > auto.yaml"):
        load_config(AUTO, None, ["data.path=/x"])


def test_before_the_images_are_looked_at_as_many_channels_as_are_set_are_taken_for_typical() -> None:
    config = load(Config, None, None, ["data.path=/x", "data.channels=5"], looks=True)
    assert (config.recipe, config.crops.saturation, config.crops.hue) == (AUTO, 0, 0)
