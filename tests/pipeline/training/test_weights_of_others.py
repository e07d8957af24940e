"""Files of other programs: which network is taken, from which part of the file, and what is printed of it."""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published import Head, MultiCropWrapper, Run, ViT, saved
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from tiny import NUM_IMAGES, tiny_config
from torch import Tensor, nn

from dinoray.models.errors import ConfigError, DataError
from dinoray.models.published.checkpoint import load, read_weights
from dinoray.pipeline.training.init_weights import load_initial_weights
from dinoray.pipeline.training.init_weights import read_weights as read_path
from dinoray.pipeline.training.match_weights import adapt
from dinoray.pipeline.training.step import TrainState, build_state

HEAD: dict[str, Any] = {"out_dim": 32, "hidden_dim": 48, "bottleneck_dim": 16}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def vit() -> nn.Module:
    """timm's own model in the shape of `tiny_config`."""
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, **tiny_config().backbone.kwargs
    )


def head() -> nn.Module:
    return Head(32)


class Module(nn.Module):
    """A program's network: an nn.Module with parts under the names that this program gives them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def started(path: Path, load: Any = "weights", **changes: Any) -> tuple[TrainState, list[str]]:
    """A new run that starts from the file, and its lines, without the folder."""
    weights = read_path(str(path))
    config = adapt(tiny_config(head=HEAD, **changes), weights)
    state = build_state(config, num_images=NUM_IMAGES)
    return state, [line.replace(f"{path.parent}/", "") for line in load_initial_weights(state, weights, load)]


def assert_backbones(state: TrainState, student: nn.Module, teacher: nn.Module) -> None:
    for ours, theirs in ((state.dino.student, student), (state.dino.teacher, teacher)):
        expected = theirs.state_dict()
        assert expected.keys() == ours.backbone.state_dict().keys()
        for name, value in ours.backbone.state_dict().items():
            assert torch.equal(value, expected[name]), name


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
            "arch": "vit_small",
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


def test_vit_of_the_transformers_library_computes_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
    )
    model = transformers.ViTModel(config).eval()
    state = build_state(tiny_config(), num_images=NUM_IMAGES)
    load(state.dino, read_weights(saved(model.state_dict()), "x.bin"))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours = state.dino.teacher.backbone.eval()(x)
        theirs = model(pixel_values=x).last_hidden_state[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Remedies: each error is raised, its remedy followed, and the run then starts


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    good, bad = Run().train(), Run().train()
    for value in (float("nan"), float("inf")):
        state = copy.deepcopy(bad.state())
        state["teacher"]["backbone.blocks.1.attn.qkv.weight"][3, 4] = value
        (tmp_path / "bad.pth").write_bytes(saved(state))
        with pytest.raises(
            DataError,
            match=r"bad.pth has NaN or infinite values in the teacher's backbone.blocks.1.attn.qkv.weight; start from "
            r"an earlier checkpoint of that training, or without init.path \(--init-from\)$",
        ):
            started(tmp_path / "bad.pth")
    (tmp_path / "good.pth").write_bytes(saved(good.state()))
    started(tmp_path / "good.pth")


@pytest.mark.parametrize("where", ["head", "center"])
def test_head_that_is_not_finite_can_be_left_out(where: str, tmp_path: Path) -> None:
    state = Run().train().state()
    if where == "head":
        state["student"]["module.head.mlp.0.bias"][0] = float("nan")
    else:
        state["dino_loss"]["center"][0, 0] = float("nan")
    (tmp_path / "x.pth").write_bytes(saved(state))
    with pytest.raises(
        DataError, match=r"x.pth has NaN .* head\..*; set init.load=backbone to leave the head out$"
    ):
        started(tmp_path / "x.pth")
    started(tmp_path / "x.pth", "backbone")


def test_optimizer_that_is_not_finite_can_be_left_out(tmp_path: Path) -> None:
    state = Run().train().state()
    state["optimizer"]["state"][0]["exp_avg"][0] = float("nan")
    (tmp_path / "x.pth").write_bytes(saved(state))
    longer = {"train": {"epochs": 9, "global_batch_size": 4}}
    with pytest.raises(
        DataError, match=r"NaN or infinite values in the optimizer's state; set init.load=weights$"
    ):
        started(tmp_path / "x.pth", "run", **longer)
    started(tmp_path / "x.pth", "weights", **longer)


def test_epochs_that_are_over_name_a_number_that_is_enough(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(saved(Run().train().state()))
    with pytest.raises(ConfigError, match=r"^train.epochs=2 .* the 7 epochs .*; set train.epochs=8 or more"):
        started(tmp_path / "x.pth", "run")
    started(tmp_path / "x.pth", "run", train={"epochs": 8, "global_batch_size": 4})
    started(tmp_path / "x.pth", "weights")


@pytest.mark.parametrize("missing", ["optimizer", "epoch"])
def test_weights_alone_cannot_be_continued(missing: str, tmp_path: Path) -> None:
    state = Run().train().state()
    del state[missing]
    (tmp_path / "x.pth").write_bytes(saved(state))
    with pytest.raises(ConfigError, match=r"x.pth lacks; set init.load=weights$"):
        started(tmp_path / "x.pth", "run")
    started(tmp_path / "x.pth", "weights")


def test_head_of_another_kind_can_be_left_out(tmp_path: Path) -> None:
    run = Run().train()
    state = run.state()
    for network, prefix in (("student", "module."), ("teacher", "")):
        state[network][f"{prefix}head.mlp.7.weight"] = torch.zeros(2, 2, 2)
    (tmp_path / "x.pth").write_bytes(saved(state))
    with pytest.raises(ConfigError, match=r"head is of another kind: .*; set init.load=backbone"):
        started(tmp_path / "x.pth")
    started(tmp_path / "x.pth", "backbone")


@pytest.mark.parametrize(
    ("name", "content"), [("x.onnx", b"\x08\x08"), ("X.ONNX", b""), ("x.npz", b"PK"), ("config.json", b"{}")]
)
def test_files_of_other_kinds_are_named_as_such(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"^init.path=.*{name} is not a file of weights .*; pass the .pth or"
    ):
        read_path(str(tmp_path / name))


@pytest.mark.parametrize("name", ["weights", "weights.ckpt", "weights.whatever", "model.pth.tar"])
def test_kind_of_a_file_is_seen_by_its_content(name: str, tmp_path: Path) -> None:
    net = vit()
    torch.save(net.state_dict(), tmp_path / name)
    assert_backbones(started(tmp_path / name)[0], net, net)
    save_file(net.state_dict(), tmp_path / name)
    assert_backbones(started(tmp_path / name)[0], net, net)


def test_folder_without_a_run_names_a_file_in_it(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "b.pth")
    with pytest.raises(
        ConfigError, match=rf"is a folder but no .*; pass .* such as {tmp_path}/b.pth, or a run"
    ):
        read_path(str(tmp_path))
    started(tmp_path / "b.pth")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_tiny", "vit_small_patch14_reg4_dinov2"])
def test_backbone_that_is_proposed_fits(name: str, tmp_path: Path) -> None:
    """The file does not say which network it is of: the proposal comes from names and shapes."""
    torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=rf"; set backbone.name={name} and no backbone.kwargs$"):
        started(tmp_path / "x.pth")
    crops = {"global_crop_size": 56, "local_crop_size": 56, "num_local_crops": 2}
    started(tmp_path / "x.pth", backbone={"name": name, "kwargs": {}}, crops=crops)


def test_vit_of_no_published_shape_gets_arguments_that_fit(tmp_path: Path) -> None:
    kwargs = {"embed_dim": 96, "depth": 3, "num_heads": 1, "patch_size": 8, "mlp_ratio": 2.0, "img_size": 32}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, reg_tokens=2, init_values=1e-5, **kwargs)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError) as caught:
        started(tmp_path / "x.pth")
    settings = re.findall(r"backbone\.kwargs\.(\w+)=([\w.-]+)", str(caught.value).partition("; set ")[2])
    followed = {key: float(value) if re.search("[.e]", value) else int(value) for key, value in settings}
    crops = {"global_crop_size": 32, "local_crop_size": 16}
    backbone = {"kwargs": {**tiny_config().backbone.kwargs, **followed}}
    assert_backbones(started(tmp_path / "x.pth", backbone=backbone, crops=crops)[0], net, net)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (lambda: timm.create_model("resnet18", in_chans=4, num_classes=0), "images of 4 channels, not RGB"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), "no model of timm's that was tried fits"),
        (
            lambda: Module(embeddings=nn.Linear(3, 4)),
            "names are those of transformers, and no model of timm's",
        ),
    ],
)
def test_weights_that_no_setting_fits_are_no_reason_to_set_one(
    net: Callable[[], nn.Module], reason: str, tmp_path: Path
) -> None:
    torch.save(net().state_dict(), tmp_path / "x.pth")
    with pytest.raises(
        ConfigError, match=rf"{reason}.*: start from other weights, or without init.path"
    ) as caught:
        started(tmp_path / "x.pth")
    assert "set backbone" not in str(caught.value)


def test_official_weights_for_a_backbone_that_is_no_vit_name_one_that_fits(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "x.pth")
    resnet = {"name": "resnet18", "kwargs": {}}
    with pytest.raises(
        ConfigError, match=r"does not fit backbone.name=resnet18: .* set backbone.name=vit_tiny_\w+$"
    ):
        started(tmp_path / "x.pth", backbone=resnet)


def test_tensors_without_values_are_no_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = vit().state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    with pytest.raises(DataError, match="holds no weights"):
        read_weights(file.getvalue(), "x.pth")
