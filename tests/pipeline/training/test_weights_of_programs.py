"""The table of programs: what a file seems to come from, and what of it does not fit, with the remedy."""

import re
import sys
from pathlib import Path
from typing import Any

import foreign_weights
import pytest
import timm
import torch
import torch.distributed as dist
from foreign_weights import Module, assert_backbones, head, started, vit
from published import saved
from tiny import tiny_config
from torch import Tensor, nn
from torch.distributed import checkpoint as sharded
from torch.distributed._shard.sharded_tensor import Shard, ShardMetadata, init_from_local_shards
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinoray.models.errors import ConfigError, DataError
from dinoray.models.published.checkpoint import fit_backbone, parse
from dinoray.models.published.programs import in_timms_names
from dinoray.pipeline.training.init_weights import read_weights


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Which program a file seems to come from

NAMES = {
    "transformers, DINOv3": ["layer.0.mlp.gate_proj.weight"],
    "transformers, DINOv2": ["embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"],
    "transformers, ViT": ["embeddings.patch_embeddings.projection.weight"],
    "transformers": ["embedder.embedder.convolution.weight", "conv1.weight"],
    "torchvision": ["conv_proj.weight"],
    "MMPretrain": ["patch_embed.projection.weight"],
    "open_clip": ["visual.class_embedding", "conv1.weight"],
    "DINOv3": ["cls_token", "storage_tokens"],
    "DINOv2": ["cls_token", "blocks.0.3.ls1.gamma"],
    "solo-learn": ["backbone.conv1.weight", "momentum_backbone.conv1.weight"],
    "lightly": ["student_backbone.conv1.weight", "teacher_backbone.conv1.weight"],
    "lightly-train": ["_model.conv1.weight"],
    "lightly-train, DINOv2": [
        f"student_embedding_model.wrapped_model._model.{k}" for k in ("cls_token", "register_tokens")
    ],
    "MoCo v3": ["module.base_encoder.conv1.weight", "module.momentum_encoder.conv1.weight"],
    "MoCo": ["module.encoder_q.conv1.weight"],
}


@pytest.mark.parametrize("program", NAMES)
def test_file_that_cannot_be_used_names_its_program(program: str) -> None:
    weights = parse({name: torch.zeros(2) for name in NAMES[program]})
    state = {k.removeprefix("backbone."): v for k, v in weights.teacher.items()}
    with pytest.raises(
        ConfigError, match=rf"^the checkpoint \({program}\) does not fit .*: it lacks "
    ) as caught:
        fit_backbone(state, vit(), args=weights.args)
    assert f"; its names are those of {program}, and no model of timm's that was tried fits: start" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_names_of_timm_and_of_the_published_code_need_no_program(tmp_path: Path) -> None:
    torch.save({"teacher": vit().state_dict(), "args": {"program": "x", "num_heads": 7}}, tmp_path / "x.pth")
    assert not {"program", "num_heads"} & read_weights(str(tmp_path / "x.pth")).args.keys()
    started(tmp_path / "x.pth")


# Lightning's checkpoints with a head, as lightly-train writes them


def test_both_networks_of_lightly_train_are_read_with_their_heads(tmp_path: Path) -> None:
    student, teacher, heads = vit(), vit(), [head(), head()]
    state = Module(
        student_embedding_model=Module(wrapped_model=Module(_model=student)),
        teacher_embedding_model=Module(wrapped_model=Module(_model=teacher)),
        student_projection_head=heads[0],
        teacher_projection_head=heads[1],
    ).state_dict()
    state = {k.replace("head.mlp.", "head.layers."): v for k, v in state.items()}
    torch.save({"state_dict": state | {"criterion.center": torch.ones(1, 1, 32)}}, tmp_path / "x.ckpt")
    ours, lines = started(tmp_path / "x.ckpt")
    assert_backbones(ours, student, teacher)
    assert torch.equal(ours.dino.teacher.head.last_layer.weight_v, heads[1].last_layer.weight_v)
    assert lines[2] == "centre from 'state_dict.criterion.center' of x.ckpt"


def test_objects_of_lightly_train_name_the_command_that_exports_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Module, "__module__", "lightly_train")
    monkeypatch.setitem(sys.modules, "lightly_train", foreign_weights)
    torch.save(
        {"state_dict": vit().state_dict(), "lightly_train": {"model": Module(net=vit())}}, tmp_path / "x.ckpt"
    )
    with pytest.raises(
        DataError,
        match=r"x.ckpt is a training checkpoint of lightly-train and holds its objects, .*; export its backbone: "
        r"lightly-train export checkpoint=.*x.ckpt out=weights.pt part=model format=torch_state_dict$",
    ):
        read_weights(str(tmp_path / "x.ckpt"))


# MoCo v3


def _moco(net: nn.Module, arch: str) -> dict[str, Any]:
    both = Module(module=Module(base_encoder=net, momentum_encoder=net))
    return {"epoch": 3, "arch": arch, "state_dict": both.state_dict()}


def test_heads_of_moco_v3_are_its_own(tmp_path: Path) -> None:
    """Its vit_small has 12 heads, timm's has 6."""
    small = {"embed_dim": 48, "depth": 1, "patch_size": 4}
    net = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=16, num_heads=12, **small)
    (tmp_path / "x.pth").write_bytes(saved(_moco(net, "vit_small")))
    backbone = {"name": "vit_small_patch16_224", "kwargs": {**small, "num_heads": 6}}
    with pytest.raises(
        ConfigError,
        match=r"has 6 attention heads, .* \(MoCo v3, arch=vit_small\) has 12; set .*\.num_heads=12$",
    ):
        started(tmp_path / "x.pth", backbone=backbone)
    backbone["kwargs"]["num_heads"] = 12  # type: ignore[index]
    assert_backbones(started(tmp_path / "x.pth", backbone=backbone)[0], net, net)


def test_model_that_is_proposed_for_moco_v3_has_its_heads() -> None:
    weights = parse(_moco(_build("vit_small_patch16_224", in_full=True), "vit_small"))
    state = {k.removeprefix("backbone."): v for k, v in weights.teacher.items()}
    proposed = r"; set backbone.name=vit_small_patch16_224 backbone.kwargs.num_heads=12$"
    with pytest.raises(ConfigError, match=proposed):
        fit_backbone(state, vit(), args=weights.args)
    fit_backbone(state, _build("vit_small_patch16_224", in_full=True, num_heads=12), args=weights.args)


# DINOv3's own names

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}


def _dinov3(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of timm's DINOv3 in the names of DINOv3's own code, with masked biases."""
    own: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        name = name.replace("reg_token", "storage_tokens").replace("fc1_g", "w1").replace("fc1_x", "w2")
        own[re.sub(r"gamma_([12])", r"ls\1.gamma", name)] = tensor
    width = own["cls_token"].shape[-1]
    zeros, ones = torch.zeros(width), torch.ones(width)
    for block in range(len(net.blocks)):  # type: ignore[arg-type]
        before = f"blocks.{block}.attn."
        q, v = own.pop(f"{before}q_bias", zeros), own.pop(f"{before}v_bias", zeros)
        own[f"{before}qkv.bias"] = torch.cat([q, ones, v])
        own[f"{before}qkv.bias_mask"] = torch.cat([ones, zeros, ones])
    return own | {"mask_token": torch.zeros(1, width), "rope_embed.periods": torch.zeros(4)}


def _build(name: str, *, in_full: bool = False, **kwargs: Any) -> nn.Module:
    """timm's model with biases that are not zero; `in_full`: a large one, whose other values are not set."""
    with torch.device("meta" if in_full else "cpu"):
        net = timm.create_model(name, num_classes=0, **kwargs).eval()
    net = net.to_empty(device="cpu") if in_full else net
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith("_bias"):
                parameter.normal_()
    return net


def test_biases_of_dinov3_are_read() -> None:
    theirs, ours = (_build("vit_small_patch16_dinov3_qkvb", **SMALL) for _ in range(2))
    notes: list[str] = []
    ours.load_state_dict(fit_backbone(_dinov3(theirs), ours, notes=notes))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert [note for note in notes if "global_pool=token" in note]
    assert not [note for note in notes if "keys" in note]


def test_biases_for_keys_that_are_left_out_are_printed() -> None:
    net, notes = _build("vit_small_patch16_dinov3_qkvb", **SMALL), []  # type: ignore[var-annotated]
    state = {k: v for k, v in _dinov3(net).items() if not k.endswith("bias_mask")}
    fit_backbone(state, net, notes=notes)
    assert [
        n
        for n in notes
        if n.startswith("left out: blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias, the part for keys")
    ]


def test_biases_that_are_zero_are_not_missed() -> None:
    theirs, ours = (_build("vit_small_patch16_dinov3", **SMALL) for _ in range(2))
    ours.load_state_dict(fit_backbone(_dinov3(theirs), ours))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_biases_that_the_backbone_lacks_name_the_one_that_has_them() -> None:
    state = _dinov3(_build("vit_small_patch16_dinov3_qkvb", in_full=True))
    with pytest.raises(
        ConfigError,
        match=r"it has beside it blocks\.0\.attn\.qkv\.bias, .*; set backbone.name=vit_small_patch16_dinov3_qkvb$",
    ):
        fit_backbone(state, _build("vit_small_patch16_dinov3", in_full=True))
    fit_backbone(state, _build("vit_small_patch16_dinov3_qkvb", in_full=True))


def test_convnext_of_dinov3_is_read() -> None:
    small = {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    theirs, ours = (_build("convnext_tiny", **small) for _ in range(2))
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        state[name.replace("head.norm", "norm")] = tensor
    state |= {f"norms.3.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(fit_backbone(state, ours))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


# Files in parts


def test_sharded_checkpoint_of_dinov3_is_read_once_it_is_joined(tmp_path: Path) -> None:
    net, folder = vit(), tmp_path / "ckpt"
    model = {
        f"{which}.backbone.{k}": v for which in ("student", "teacher") for k, v in net.state_dict().items()
    }
    sharded.save({"model": model, "iteration": 3}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(
        ConfigError,
        match=rf"pass weights.pth, which this writes: python -m .* dcp_to_torch {folder} weights.pth$",
    ):
        read_weights(str(folder))
    dcp_to_torch_save(folder, tmp_path / "weights.pth")  # that command's function
    assert_backbones(started(tmp_path / "weights.pth")[0], net, net)


def test_shard_of_dinov2_names_the_file_with_whole_tensors(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard = Shard(torch.zeros(4, 2), ShardMetadata([0, 0], [4, 2], "rank:0/cpu"))
        torch.save(
            {"model": {"student.backbone.x": init_from_local_shards([shard], 4, 2)}},
            tmp_path / "x.rank_0.pth",
        )
    finally:
        dist.destroy_process_group()
    with pytest.raises(
        DataError, match=r"is a training checkpoint of DINOv2 .*; pass the teacher_checkpoint.pth in eval/"
    ):
        read_weights(str(tmp_path / "x.rank_0.pth"))


# Renaming


def test_missing_key_projection_is_not_invented() -> None:
    names = ["embeddings.patch_embeddings.projection.weight"]
    names += [
        f"encoder.layer.0.attention.attention.{which}.{kind}"
        for which in ("query", "value")
        for kind in ("weight", "bias")
    ]
    found = in_timms_names({f"backbone.{name}": torch.ones(2) for name in names})
    assert found.keys() == {
        "backbone.patch_embed.proj.weight",
        "backbone.blocks.0.attn.q.weight",
        "backbone.blocks.0.attn.v.weight",
        "backbone.blocks.0.attn.qkv.bias",
    }
    assert found["backbone.blocks.0.attn.qkv.bias"].tolist() == [1, 1, 0, 0, 1, 1]


def test_vit_without_biases_of_attention_names_the_setting(tmp_path: Path) -> None:
    kwargs = {**tiny_config().backbone.kwargs, "qkv_bias": False}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **kwargs)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    with pytest.raises(
        ConfigError, match=r"lacks blocks.0.attn.qkv.bias, .*; set backbone.kwargs.qkv_bias=false"
    ):
        started(tmp_path / "x.pth")
    assert_backbones(started(tmp_path / "x.pth", backbone={"kwargs": kwargs})[0], net, net)
