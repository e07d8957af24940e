"""Files of other programs: which network is taken, from which part of the file, and what is printed of it."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from foreign_weights import Module, assert_backbones, head, started, vit
from published import Head, MultiCropWrapper, Run, ViT, saved
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from tiny import NUM_IMAGES, tiny_config
from torch import Tensor, nn

from dinoray.models.published.checkpoint import read_weights
from dinoray.pipeline.training.init_weights import load_initial_weights
from dinoray.pipeline.training.init_weights import read_weights as read_path
from dinoray.pipeline.training.state import build_state


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Each program's form: the modules as it calls them, and the file as it saves it

FORMS: dict[str, tuple[Callable[[nn.Module, nn.Module], Any], str, str]] = {
    "solo-learn": (
        lambda a, b: {
            "epoch": 3,
            "global_step": 9,
            "pytorch-lightning_version": "2.1.2",
            "state_dict": Module(
                backbone=a,
                classifier=nn.Linear(32, 5),
                head=head(),
                momentum_backbone=b,
                momentum_head=head(),
            ).state_dict(),
            "hyper_parameters": {"backbone": "vit_tiny"},
        },
        "state_dict.backbone",
        "state_dict.momentum_backbone",
    ),
    "lightly": (
        lambda a, b: {
            "state_dict": Module(
                student_backbone=a, student_head=head(), teacher_backbone=b, teacher_head=head()
            ).state_dict()
        },
        "state_dict.student_backbone",
        "state_dict.teacher_backbone",
    ),
    "MoCo v3": (
        lambda a, b: {
            "epoch": 5,
            "arch": "vit_own",
            "state_dict": Module(
                module=Module(base_encoder=a, momentum_encoder=b, predictor=nn.Linear(8, 8))
            ).state_dict(),
            "optimizer": {},
            "scaler": {"scale": 1.0},
        },
        "state_dict.module.base_encoder",
        "state_dict.module.momentum_encoder",
    ),
    "MoCo": (
        lambda a, b: {"state_dict": Module(module=Module(encoder_q=a, encoder_k=b)).state_dict()},
        "state_dict.module.encoder_q",
        "state_dict.module.encoder_k",
    ),
    "BYOL": (
        lambda a, b: {"model": Module(online_network=a, target_network=b, predictor=head()).state_dict()},
        "model.online_network",
        "model.target_network",
    ),
    "I-JEPA": (
        lambda a, b: {
            "encoder": Module(module=a).state_dict(),
            "predictor": Module(module=nn.Linear(4, 4)).state_dict(),
            "target_encoder": Module(module=b).state_dict(),
            "epoch": 4,
            "lr": 0.1,
        },
        "encoder.module",
        "target_encoder.module",
    ),
    "VISSL": (
        lambda a, b: {
            "phase_idx": 3,
            "classy_state_dict": {
                "base_model": {"model": {"trunk": a.state_dict(), "heads": {}}, "meta": {}}
            },
        },
        "classy_state_dict.base_model.model.trunk",
        "classy_state_dict.base_model.model.trunk",
    ),
    "lightly-train": (
        lambda a, b: Module(_model=a).state_dict(),
        "_model",
        "_model",
    ),
    "torch.compile": (
        lambda a, b: {"model": Module(module=Module(_orig_mod=a)).state_dict(), "args": {"lr": 1}},
        "model.module._orig_mod",
        "model.module._orig_mod",
    ),
    "unknown": (
        lambda a, b: {
            "step": 4,
            "nets": Module(my_encoder=Module(net=a), ema_of_it=Module(net=b)).state_dict(),
        },
        "nets.ema_of_it.net",
        "nets.ema_of_it.net",
    ),
    "state_dict_ema": (
        lambda a, b: {"state_dict": a.state_dict(), "state_dict_ema": b.state_dict()},
        "state_dict_ema",
        "state_dict_ema",
    ),
    "model_ema": (
        lambda a, b: {"model_ema": b.state_dict(), "model": a.state_dict()},
        "model_ema",
        "model_ema",
    ),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_networks_of_other_programs_are_found(form: str, legacy: bool, tmp_path: Path) -> None:
    make, student_from, teacher_from = FORMS[form]
    student, teacher = vit(), vit()
    nets = {False: student, True: teacher}
    (tmp_path / "x.ckpt").write_bytes(saved(make(student, teacher), legacy=legacy))
    state, lines = started(tmp_path / "x.ckpt", "backbone")
    is_teacher = [
        bool(re.search("momentum|teacher|_k|target|ema", place)) for place in (student_from, teacher_from)
    ]
    assert_backbones(state, nets[is_teacher[0]], nets[is_teacher[1]])
    if student_from == teacher_from:
        assert lines[0] == f"student and teacher from '{teacher_from}' of x.ckpt: backbone (30 tensors)"
    else:
        assert lines[:2] == [
            f"student from '{student_from}' of x.ckpt: backbone (30 tensors)",
            f"teacher from '{teacher_from}' of x.ckpt: backbone (30 tensors)",
        ]


@pytest.mark.parametrize("safe", [False, True], ids=["torch", "safetensors"])
def test_bare_state_dict_goes_to_both_networks(safe: bool, tmp_path: Path) -> None:
    net, path = vit(), tmp_path / ("x.safetensors" if safe else "x.pth")
    save_file(net.state_dict(), path) if safe else torch.save(net.state_dict(), path)
    state, lines = started(path)
    assert_backbones(state, net, net)
    assert lines == [
        f"student and teacher from {path.name}: backbone (30 tensors)",
        "skipped: nothing",
        "new: head, centre, optimizer state",
    ]


def test_model_folders_of_other_libraries_are_read(tmp_path: Path) -> None:
    net = vit()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    state = build_state(tiny_config(), num_images=NUM_IMAGES)
    load_initial_weights(state, read_path(str(tmp_path)), "weights")
    assert_backbones(state, net, net)


def test_timm_training_checkpoint_gives_its_ema(tmp_path: Path) -> None:
    """timm's own saver, EMA and optimizer write the file."""
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=16, **tiny_config().backbone.kwargs
    )
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    ema.update(model, step=1)
    saver = CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(3, metric=0.5)
    state, lines = started(tmp_path / "last.pth.tar")
    averaged = copy.deepcopy(ema.module)
    averaged.reset_classifier(0)
    assert_backbones(state, averaged, averaged)
    assert lines[0] == "student and teacher from 'state_dict_ema' of last.pth.tar: backbone (30 tensors)"
    assert {"skipped: state_dict", "optimizer", "epoch", "metric"} <= set(lines[1].split(", "))
    assert lines[2:] == [
        "new: head, centre, optimizer state",
        "'state_dict_ema' is taken, an exponential moving average of the weights; 'state_dict' is left out",
        "left out, not part of the backbone: head.weight, head.bias",
    ]


def test_lines_of_a_published_checkpoint_name_all_parts(tmp_path: Path) -> None:
    """Lines for a whole checkpoint, with each `init.load`."""
    run = Run().train(3)
    (tmp_path / "checkpoint.pth").write_bytes(saved(run.state()))
    networks = [
        "student from 'student.module.backbone' of checkpoint.pth: backbone (30 tensors)",
        "teacher from 'teacher.backbone' of checkpoint.pth: backbone (30 tensors)",
    ]
    whole = [f"{line}, head (8 tensors)" for line in networks]
    center = "centre from 'dino_loss.center' of checkpoint.pth"
    longer = {"train": {"epochs": 9, "global_batch_size": 4}}
    assert started(tmp_path / "checkpoint.pth", "run", **longer)[1] == [
        *whole,
        center,
        "optimizer state of 37 of 37 parameters; training continues at epoch 7, step 70",
        "skipped: fp16_scaler",
        "new: nothing",
    ]
    assert started(tmp_path / "checkpoint.pth", "weights")[1] == [
        *whole,
        center,
        "skipped: fp16_scaler, optimizer, epoch",
        "new: optimizer state",
    ]
    assert started(tmp_path / "checkpoint.pth", "backbone")[1] == [
        *networks,
        "skipped: fp16_scaler, head, dino_loss.center, optimizer, epoch",
        "new: head, centre, optimizer state",
    ]


def test_second_head_of_ibot_is_skipped(tmp_path: Path) -> None:
    def network() -> nn.Module:
        net = MultiCropWrapper(ViT(), Head(32))
        net.head.last_layer2 = nn.Linear(16, 32)
        net.backbone.masked_embed = nn.Parameter(torch.zeros(1, 32))
        return net

    student, teacher = network(), network()
    state = {"student": Module(module=student).state_dict(), "teacher": teacher.state_dict(), "epoch": 2}
    state["ibot_loss"] = {"center": torch.ones(1, 32), "center2": torch.ones(1, 1, 32)}
    torch.save(state, tmp_path / "checkpoint.pth")
    ours, lines = started(tmp_path / "checkpoint.pth")
    assert torch.equal(ours.dino.teacher.head.last_layer.weight_v, teacher.head.last_layer.weight_v)
    assert bool((ours.dino.center == 1).all())
    assert lines[2:] == [
        "centre from 'ibot_loss.center' of checkpoint.pth",
        "skipped: student.module.head.last_layer2, teacher.head.last_layer2, ibot_loss.center2, epoch",
        "new: optimizer state",
        "left out, not part of the backbone: masked_embed",
    ]


def test_teacher_of_another_architecture_is_left_out(tmp_path: Path) -> None:
    student, teacher = ViT(), ViT(dim=48)
    torch.save({"student": student.state_dict(), "teacher": teacher.state_dict()}, tmp_path / "x.pth")
    state, lines = started(tmp_path / "x.pth")
    assert_backbones(state, student, student)
    assert "'teacher' is another network than 'student' and is left out" in lines


# transformers


def in_transformers_names(net: nn.Module) -> dict[str, Tensor]:
    """The table in the docstring of transformers' own conversion script, backwards."""
    named: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        match = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name)
        if match:
            for which, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                named[f"encoder.layer.{match[1]}.attention.attention.{which}.{match[2]}"] = part.clone()
            continue
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            (r"blocks\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
            (r"blocks\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
            (r"blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"),
            (r"blocks\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
            (r"blocks\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
            (r"norm\.", "layernorm."),
        ):
            new, times = re.subn(f"^{ours}", theirs, name)
            if times:
                named[new] = tensor
                break
    return named


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_vits_of_transformers_are_renamed(prefix: str, tmp_path: Path) -> None:
    net = vit()
    state = {f"{prefix}{k}": v for k, v in in_transformers_names(net).items()}
    assert len(state) == 30 + 4 * 2
    torch.save(state | {"classifier.weight": torch.zeros(5, 32)}, tmp_path / "pytorch_model.bin")
    ours, lines = started(tmp_path / "pytorch_model.bin")
    assert_backbones(ours, net, net)
    assert not read_weights((tmp_path / "pytorch_model.bin").read_bytes(), "x").official
    assert "classifier" in " ".join(lines)
