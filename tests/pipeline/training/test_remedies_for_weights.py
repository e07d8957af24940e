"""Files that no run can start from: the error names a remedy, and once it is followed the run starts."""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from foreign_weights import Module, assert_backbones, started, vit
from published import Run, saved
from published_twins import reordered
from safetensors.torch import save_file
from tiny import tiny_config
from torch import nn

from dinoray.models.errors import ConfigError, DataError
from dinoray.models.published.checkpoint import read_weights
from dinoray.pipeline.training.init_weights import read_weights as read_path
from dinoray.pipeline.training.published_weights import fetch_published_weights


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    good, bad = Run().train(), Run().train()
    for value in (float("nan"), float("inf")):
        state = copy.deepcopy(bad.state())
        state["teacher"]["backbone.blocks.1.attn.qkv.weight"][3, 4] = value
        (tmp_path / "bad.pth").write_bytes(saved(state))
        with pytest.raises(
            DataError,
            match=r"bad.pth has NaN or infinite values in the teacher's backbone.blocks.1.attn.qkv.weight; start from "
            r"an earlier checkpoint of that training, or without init.from \(--init-from\)$",
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
        ConfigError, match=rf"^init.from=.*{name} is not a file of weights .*; pass the .pth or"
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
        ConfigError, match=rf"{reason}.*: start from other weights, or without init.from"
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


LONGER = {"train": {"epochs": 9, "global_batch_size": 4}}


def test_optimizer_state_of_another_order_is_restored(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(saved(reordered(Run().train().state())))
    lines = started(tmp_path / "x.pth", "run", **LONGER)[1]
    assert [line for line in lines if line.startswith("optimizer state of 37 of 37 parameters; training")]
    assert "new: nothing" in lines


def test_optimizer_state_that_is_not_restored_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(saved(Run().train().state()))
    lines = started(tmp_path / "x.pth", "run", optim={"name": "sgd"}, **LONGER)[1]
    assert (
        "optimizer state: none of 37 parameters restored, because optim.name=sgd is adamw there; set optim.name=adamw "
        "to restore it; training continues with fresh moments at epoch 7, step 70"
    ) in lines
    assert "new: optimizer state" in lines
    state = Run().train().state()
    state["optimizer"]["param_groups"][0]["params"].pop()
    state["optimizer"]["param_groups"][1]["params"].pop()
    (tmp_path / "x.pth").write_bytes(saved(state))
    (line,) = [k for k in started(tmp_path / "x.pth", "run", **LONGER)[1] if k.startswith("optimizer state")]
    assert "because" in line


def test_pretrained_and_a_file_are_not_both_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    config = tiny_config(backbone={"pretrained": True})
    with pytest.raises(
        ConfigError, match=r"^backbone.pretrained=true and init.from=/x.pth both .*pretrained=false"
    ):
        fetch_published_weights(config, init_path="/x.pth")


def test_empty_folder_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is an empty folder; pass a file of weights"):
        read_path(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_path(str(tmp_path / "none"))
