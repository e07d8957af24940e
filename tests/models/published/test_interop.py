"""Published checkpoints come in and go out: the same logits, the same optimiser, nothing run that a file holds."""

import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from published import Head, MultiCropWrapper, Run, ViT, load_pretrained_weights, saved
from tiny import TINY_RESNET, tiny_config
from torch import Tensor, nn

from dinoray.models.config import OptimConfig
from dinoray.models.dino import DINO
from dinoray.models.errors import ConfigError, DataError
from dinoray.models.optim import build_optimizer
from dinoray.models.published.checkpoint import (
    fit_backbone,
    load,
    load_optimizer,
    parse,
    read_weights,
    to_official,
)

HEAD: dict[str, Any] = {"out_dim": 32, "hidden_dim": 48, "bottleneck_dim": 16}
RESNET: dict[str, Any] = {"name": "resnet18", "kwargs": {}}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def dino(
    *,
    pos_embed: str = "official",
    backbone: dict[str, Any] | None = None,
    crops: dict[str, Any] | None = None,
    **head: Any,
) -> DINO:
    """Our networks in the shape of `published.Run`."""
    sections = {"backbone": backbone or {"pos_embed": pos_embed}, "crops": crops or {}}
    config = tiny_config(**sections, head={**HEAD, **head})
    return DINO(config.backbone, config.head, crop_sizes=config.crops.crop_sizes).eval()


def own_vit(**kwargs: Any) -> dict[str, Any]:
    """The `backbone` section of the tiny ViT with other arguments."""
    return {"pos_embed": "official", "kwargs": {**tiny_config().backbone.kwargs, **kwargs}}


def read(state: Any) -> Any:
    return read_weights(saved(state), "checkpoint.pth")


def torchvision_resnet() -> nn.Module:
    model = torchvision.models.resnet18(weights=None)
    model.fc = nn.Identity()
    for buffer in model.buffers():  # batch norm that has seen something
        if buffer.ndim:
            buffer.uniform_(0.5, 1.5)
    return model


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@torch.no_grad()
def assert_same_networks(ours: DINO, run: Run, *sizes: int) -> None:
    ours.eval()
    for mine, theirs in zip((ours.student, ours.teacher), run.networks, strict=True):
        theirs.eval()
        for size in sizes:
            x = torch.randn(3, 3, size, size)
            assert_same(mine([x]).logits, theirs(x))
            assert_same(mine([x]).features, theirs.backbone(x))
    assert torch.equal(ours.center, run.loss.center[0])


# Reading: whole checkpoints


def test_a_published_checkpoint_gives_the_same_logits_at_every_crop_size() -> None:
    run, ours = Run().train(), dino()
    assert load(ours, read(run.state())).notes == []
    assert_same_networks(ours, run, 16, 8, 12, 28)


def test_the_published_interpolation_is_what_makes_small_crops_agree() -> None:
    run, ours = Run().train(), dino(pos_embed="timm")
    load(ours, read(run.state()))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert float((ours.teacher([x]).features - run.networks[1].eval().backbone(x)).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"num_layers": 1}, {"num_layers": 1}),
        ({"num_layers": 2}, {"num_layers": 2}),
        ({"use_bn": True}, {"use_bn": True}),
        ({"norm_last_layer": False}, {"norm_last_layer": False}),
    ],
)
def test_every_kind_of_head_comes_in(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    run, networks = Run(**theirs).train(), dino(**ours)
    assert load(networks, read(run.state())).notes == []
    assert_same_networks(networks, run, 16)


def test_a_published_resnet_comes_in_with_its_batch_statistics() -> None:
    run, ours = Run(backbone=torchvision_resnet, use_bn=True).train(), dino(backbone=RESNET, use_bn=True)
    assert next(iter(run.state()["teacher"])).startswith("module.")
    assert load(ours, read(run.state())).notes == []
    assert_same_networks(ours, run, 32)


def test_a_whole_checkpoint_says_what_it_was_trained_with() -> None:
    run = Run().train()
    weights = read(run.state({"arch": "vit_small", "lr": 0.0005, "local_crops_scale": (0.05, 0.25)}))
    assert weights.args == {"arch": "vit_small", "lr": 0.0005, "local_crops_scale": (0.05, 0.25)}
    assert (weights.epoch, weights.has_head, weights.official) == (7, True, True)
    assert weights.optimizer is not None
    assert weights.center.shape == (32,)


def test_files_of_the_old_format_are_read_too() -> None:
    run = Run().train()
    weights = read_weights(saved(run.state(), legacy=True), "old.pth")
    assert (weights.epoch, weights.args["arch"]) == (7, "vit_own")


# Reading: parts


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "module.backbone.", "teacher.", "teacher.backbone."]
)
def test_a_backbone_alone_comes_in_under_any_prefix(prefix: str) -> None:
    vit, ours = ViT(), dino()
    weights = read({prefix + k: v for k, v in vit.state_dict().items()})
    assert weights.official
    head = {k: v.clone() for k, v in ours.student.head.state_dict().items()}
    assert load(ours, weights) == (False, False, [])
    for network in (ours.student, ours.teacher):
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            assert_same(network.backbone(x), vit(x))
        for k, v in network.head.state_dict().items():
            assert torch.equal(v, head[k])


@pytest.mark.parametrize("prefixes", [("", ""), ("backbone.", ""), ("module.backbone.", "module.")])
def test_one_network_with_its_head_goes_to_both(prefixes: tuple[str, str]) -> None:
    run, ours = Run(), dino()
    network = run.networks[1]
    state = {prefixes[0] + k: v for k, v in network.backbone.state_dict().items()}
    state |= {f"{prefixes[1]}head.{k}": v for k, v in network.head.state_dict().items()}
    assert load(ours, read(state)) == (True, False, [])
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        assert_same(ours.student([x]).logits, network.eval()(x))
        assert_same(ours.teacher([x]).logits, network(x))


@pytest.mark.parametrize(("missing", "there"), [("student", "teacher"), ("teacher", "student")])
def test_a_checkpoint_with_one_network_alone_gives_both_its_weights(missing: str, there: str) -> None:
    run, ours = Run().train(), dino()
    state = run.state()
    del state[missing]
    load(ours, read(state))
    expected = run.networks[("student", "teacher").index(there)].state_dict()
    for network in (ours.student, ours.teacher):
        for k, v in network.state_dict().items():
            assert torch.equal(v, expected[k])
    assert torch.equal(ours.center, run.loss.center[0])


def test_our_own_module_s_state_dict_is_read_and_is_not_taken_for_a_published_one() -> None:
    theirs, ours = dino(pos_embed="timm"), dino(pos_embed="timm")
    theirs.center.normal_()
    weights = read(theirs.state_dict())
    assert not weights.official
    assert load(ours, weights).notes == []
    for k, v in theirs.state_dict().items():
        assert torch.equal(v, ours.state_dict()[k])


@pytest.mark.parametrize("out_dim", [32, 64])
def test_of_a_file_with_a_head_the_backbone_alone_can_be_taken(out_dim: int) -> None:
    run, ours = Run().train(), dino(out_dim=out_dim)
    assert load(ours, read(run.state()), backbone_only=True) == (False, False, [])
    assert not ours.center.any()
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        assert_same(ours.student.backbone(x), run.networks[0].eval().backbone(x))
        assert_same(ours.teacher.backbone(x), run.networks[1].eval().backbone(x))
    assert torch.equal(ours.student.head.last_layer.weight_v, ours.teacher.head.last_layer.weight_v)


@pytest.mark.parametrize("form", ["new weight norm", "no weight norm"])
def test_prototypes_come_in_however_weight_norm_stored_them(form: str) -> None:
    run, ours = Run(norm_last_layer=False).train(), dino(norm_last_layer=False)
    state = run.state()
    for network in ("student", "teacher"):
        old = state[network]
        prefix = "module.head.last_layer." if network == "student" else "head.last_layer."
        g, v = old.pop(f"{prefix}weight_g"), old.pop(f"{prefix}weight_v")
        if form == "new weight norm":
            old |= {
                f"{prefix}parametrizations.weight.original0": g,
                f"{prefix}parametrizations.weight.original1": v,
            }
        else:
            old[f"{prefix}weight"] = g * v / v.norm(dim=1, keepdim=True)
    load(ours, read(state))
    assert ours.teacher.head.last_layer.weight_g.shape == (32, 1)
    assert_same_networks(ours, run, 16)


def test_learnt_magnitudes_that_are_kept_as_they_are_are_told() -> None:
    run, ours = Run(norm_last_layer=False).train(), dino(norm_last_layer=True)
    (note,) = load(ours, read(run.state())).notes
    assert "head.norm_last_layer=true keeps them as they are" in note
    assert_same_networks(ours, run, 16)


def test_counters_of_batches_that_old_files_lack_stay() -> None:
    run, ours = Run(use_bn=True).train(), dino(use_bn=True)
    state = run.state()
    for network in ("student", "teacher"):
        state[network] = {k: v for k, v in state[network].items() if not k.endswith("num_batches_tracked")}
    assert load(ours, read(state)).notes == []
    assert_same_networks(ours, run, 16)


def test_a_classifier_is_left_out_and_told() -> None:
    theirs = torchvision.models.resnet18(weights=None)
    ours = dino(backbone=RESNET)
    weights = read(theirs.state_dict())
    assert not weights.official
    assert load(ours, weights).notes[0] == "left out, not part of the backbone: fc.weight, fc.bias"
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same(ours.eval().teacher.backbone(x), theirs.eval()(x))


def test_a_supervised_vit_is_not_taken_for_a_published_one() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, **tiny_config().backbone.kwargs, img_size=16
    )
    weights = read(vit.state_dict())
    assert (weights.official, weights.has_head) == (False, False)
    assert load(dino(), weights).notes[0] == "left out, not part of the backbone: head.weight, head.bias"


def test_position_embeddings_are_resized_where_the_native_grid_is_another_and_that_is_told() -> None:
    theirs, ours = ViT(size=24), dino()
    notes = load(ours, read(theirs.state_dict())).notes
    assert notes[0].startswith("position embeddings resized from 37 to 17 tokens")
    same = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **tiny_config().backbone.kwargs, img_size=24
    )
    same.load_state_dict(theirs.state_dict())
    same.set_input_size(img_size=16)
    assert_same(ours.student.backbone.pos_embed, same.pos_embed)


# Files of DINOv2, DINOv3 and XCiT, by the names that their publishers gave


def build(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, num_classes=0, **kwargs).eval()


SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def assert_fits(theirs: nn.Module, state: dict[str, Tensor], ours: nn.Module, size: int) -> list[str]:
    notes: list[str] = []
    ours.load_state_dict(fit_backbone(state, ours, notes=notes))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    return notes


@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_files_come_in(chunked: bool) -> None:
    theirs, ours = (build("vit_small_patch14_dinov2", **SMALL, img_size=56) for _ in range(2))
    state = {**theirs.state_dict(), "mask_token": torch.zeros(1, 32)}
    if chunked:  # as saved in training: blocks.<chunk>.<number>
        state = {k.replace("blocks.", "blocks.0."): v for k, v in state.items()}
    assert assert_fits(theirs, state, ours, 56) == ["left out, not part of the backbone: mask_token"]
    assert read(state).official


def test_dinov2_files_with_registers_come_in() -> None:
    theirs, ours = (build("vit_small_patch14_reg4_dinov2", **SMALL, img_size=56) for _ in range(2))
    state = theirs.state_dict()
    with torch.no_grad():  # there the class token has a position of its own, and registers another name
        first = torch.randn(1, 1, 32)
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
        before = state["cls_token"]
        state["cls_token"] = before - first
        theirs.cls_token.copy_(state["cls_token"] + first)
    state["mask_token"] = torch.zeros(1, 32)
    assert_fits(theirs, state, ours, 56)
    assert not read(state).official


def test_dinov3_files_come_in(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = (build("vit_small_patch16_dinov3", **SMALL, img_size=64) for _ in range(2))
    state = {
        k.replace("reg_token", "storage_tokens")
        .replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma"): v
        for k, v in theirs.state_dict().items()
    }
    state |= {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.zeros(4)}
    state |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(96) for i in range(2)}
    assert_fits(theirs, state, ours, 64)
    assert capsys.readouterr().out == ""


def test_xcit_files_come_in() -> None:
    theirs, ours = (build("xcit_nano_12_p16_224", embed_dim=32, depth=1, num_heads=2) for _ in range(2))
    state = theirs.state_dict()
    for i in range(2):  # published with one matrix for queries, keys and values
        for kind in ("weight", "bias"):
            parts = [state.pop(f"cls_attn_blocks.{i}.attn.{x}.{kind}") for x in "qkv"]
            state[f"cls_attn_blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    state = {k.replace("pos_embed.", "pos_embeder."): v for k, v in state.items()}
    assert_fits(theirs, state, ours, 32)


# Mistakes, in one line with the remedy


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"out_dim": 64}, {}, r"head.out_dim=32 but the checkpoint has 64 prototypes; set head.out_dim=64"),
        (
            {"hidden": 40},
            {},
            r"head.hidden_dim=48 but .* 40 channels in hidden layers; set head.hidden_dim=40",
        ),
        ({"bottleneck": 8}, {}, r"head.bottleneck_dim=16 but .* 8 channels .*; set head.bottleneck_dim=8"),
        ({"num_layers": 2}, {}, r"head.num_layers=3 but the checkpoint has 2 layers; set head.num_layers=2"),
        ({"use_bn": True}, {}, r"head.use_bn=false but the checkpoint has batch norm; set head.use_bn=true"),
        ({}, {"use_bn": True}, r"head.use_bn=true but .* has no batch norm; set head.use_bn=false"),
    ],
)
def test_a_head_of_another_shape_names_the_setting_and_the_value_that_fits(
    theirs: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load(dino(**ours), read(Run(**theirs).state()))


def test_all_settings_of_the_head_that_differ_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(dino(), read(Run(out_dim=64, hidden=40, bottleneck=8).state()))
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "head.out_dim",
        "head.bottleneck_dim",
        "head.hidden_dim",
    ]


def test_nothing_is_loaded_when_something_does_not_fit() -> None:
    ours = dino()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = Run().state()
    state["teacher"] = Run(out_dim=64).state()["teacher"]
    with pytest.raises(ConfigError):
        load(ours, read(state))
    for k, v in ours.state_dict().items():
        assert torch.equal(v, before[k])


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            {"patch": 8, "size": 32},
            r"patch 4, but the checkpoint has .* patch 8; set backbone.kwargs.patch_size=8$",
        ),
        ({"depth": 3}, r"; set backbone.kwargs.depth=3$"),
        ({"dim": 48}, r"; set backbone.kwargs.embed_dim=48 backbone.kwargs.num_heads=1, or as many heads"),
        (
            {"dim": 384, "depth": 12, "patch": 8},
            r"^backbone.name=vit_tiny_patch16_224 has width 32, 2 blocks, patch 4, but the checkpoint has width 384, "
            r"12 blocks, patch 8; set backbone.name=vit_small_patch8_224 and no backbone.kwargs$",
        ),
    ],
)
def test_a_vit_of_another_shape_names_what_fits(theirs: dict[str, Any], message: str) -> None:
    kwargs = tiny_config().backbone.kwargs
    with pytest.raises(ConfigError, match=message) as caught:
        load(dino(), read(ViT(**theirs).state_dict()), kwargs=kwargs)
    name = re.search(r"backbone\.name=(\w+)", str(caught.value).partition("set ")[2])
    settings = dict(re.findall(r"backbone\.kwargs\.(\w+)=(\w+)", str(caught.value)))
    followed = {} if name else kwargs | {key: int(value) for key, value in settings.items()}
    backbone = {"name": name[1] if name else "vit_tiny_patch16_224", "kwargs": followed}
    ours = dino(backbone=backbone, crops={"global_crop_size": 32, "local_crop_size": 16})
    load(ours, read(ViT(**theirs).state_dict()))


def test_attention_heads_which_no_shape_tells_are_compared_by_the_architecture_s_name() -> None:
    state = Run(backbone=lambda: ViT(dim=192, num_heads=3)).train().state({"arch": "vit_tiny"})
    with pytest.raises(ConfigError, match=r"2 attention heads, .* arch=vit_tiny has 3; set .*num_heads=3$"):
        load(dino(backbone=own_vit(embed_dim=192)), read(state))
    load(dino(backbone=own_vit(embed_dim=192, num_heads=3)), read(state))


def test_another_kind_of_backbone_is_named_in_one_line_with_a_few_tensors() -> None:
    state = Run(backbone=torchvision_resnet).state({"arch": "resnet18"})
    message = (
        r"^the checkpoint \(arch=resnet18\) does not fit backbone.name=vit_tiny_patch16_224: it lacks cls_token, "
        r".* and \d+ more; .*; set backbone.name=resnet18$"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        load(dino(), read(state))
    assert "\n" not in str(caught.value)
    load(dino(backbone=RESNET), read(state))


def test_a_centre_of_another_length_is_refused() -> None:
    state = Run().state()
    state["dino_loss"] = {"center": torch.zeros(1, 5)}
    with pytest.raises(DataError, match=r"centre .* has 5 values for 32 prototypes; set init.load=backbone"):
        load(dino(), read(state))
    load(dino(), read(state), backbone_only=True)


# Files that are none, or more than that


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_a_program_is_refused_and_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    state = Run().state() | {"args": Malicious(tmp_path / "made")}
    data = saved(state, legacy=legacy)
    with pytest.raises(DataError, match=r"^evil.pth wants (posix|nt)\.mkdir to be called") as caught:
        read_weights(data, "evil.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^evil.pth .*mkdir"):
        read_weights(pickle.dumps(Malicious(tmp_path / "made"), protocol=2), "evil.pth")
    assert not (tmp_path / "made").exists()


def test_the_permission_to_read_a_namespace_ends_with_the_reading() -> None:
    before = set(torch.serialization.get_safe_globals())
    read(Run().state())
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "data", [b"", b"something else", saved(Run().state())[:-4000], saved(Run().state())[:100]]
)
def test_a_damaged_file_is_one_line(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^checkpoint\.pth is not a file of weights") as caught:
        read_weights(data, "checkpoint.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a dict"),
        ({}, "holds no weights: its keys are none"),
        ({"epoch": 3, "best": 0.5}, "holds no weights: its keys are epoch, best"),
        ({"student": {}, "teacher": {}}, "holds no weights: its keys are student, teacher"),
    ],
)
def test_a_file_without_weights_is_refused(state: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(state)


@pytest.mark.parametrize("optimizer", [None, [], {"state": []}, {"state": {}, "param_groups": 3}])
def test_what_is_no_optimiser_s_state_is_none(optimizer: Any) -> None:
    assert read(Run().state() | {"optimizer": optimizer, "epoch": "seven"}).optimizer is None


def test_metadata_of_any_kind_do_no_harm() -> None:
    state = OrderedDict(ViT().state_dict())
    state._metadata = ["strange"]  # type: ignore[attr-defined]
    assert parse(state).official


# The optimiser


def optimizer_of(ours: DINO, **config: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig.model_validate(config), ours.student)


def moments(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> what the optimiser remembers of the parameter."""
    return {k: dict(optimizer.state[p]) for k, p in network.named_parameters() if p in optimizer.state}


def assert_same_moments(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        assert state.keys() == theirs[name].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name][key])), (name, key)


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_optimiser_remembers_each_parameter_as_the_published_one_did(
    name: str, norm_last_layer: bool
) -> None:
    run = Run(optimizer=name, norm_last_layer=norm_last_layer).train()
    ours = dino(norm_last_layer=norm_last_layer)
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours, name=name)
    num_parameters = sum(p.requires_grad for p in ours.student.parameters())
    assert load_optimizer(optimizer, ours.student, weights.optimizer) == (num_parameters, 0)
    assert_same_moments(moments(optimizer, ours.student), moments(run.optimizer, run.networks[0]))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_next_step_is_that_of_the_published_optimiser(name: str) -> None:
    run, ours = Run(optimizer=name).train(), dino()
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours, name=name)
    load_optimizer(optimizer, ours.student, weights.optimizer)
    for group in (*optimizer.param_groups, *run.optimizer.param_groups):
        group |= {"lr": 0.01, "weight_decay": 0.1}
    theirs = run.networks[0]
    for network in (ours.student, theirs):
        for k, p in network.named_parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, 0.1 + 0.01 * len(k))
    optimizer.step()
    run.optimizer.step()
    for k, p in theirs.named_parameters():
        torch.testing.assert_close(ours.student.get_parameter(k), p)


def test_moments_find_their_parameters_when_blocks_have_rates_of_their_own() -> None:
    run, ours = Run().train(), dino()
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours, layer_decay=0.5)
    assert len(optimizer.param_groups) > 2
    assert load_optimizer(optimizer, ours.student, weights.optimizer)[1] == 0
    assert_same_moments(moments(optimizer, ours.student), moments(run.optimizer, run.networks[0]))


@pytest.mark.parametrize("theirs", [True, False])
def test_whether_the_magnitude_was_learnt_does_not_shift_the_others(theirs: bool) -> None:
    run, ours = Run(norm_last_layer=theirs).train(), dino(norm_last_layer=not theirs)
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours)
    _, fresh = load_optimizer(optimizer, ours.student, weights.optimizer)
    magnitude = "head.last_layer.weight_g"
    assert fresh == (1 if theirs else 0)
    expected = {k: v for k, v in moments(run.optimizer, run.networks[0]).items() if k != magnitude}
    assert_same_moments(moments(optimizer, ours.student), expected)


@pytest.mark.parametrize("theirs", [{"out_dim": 64}, {"num_layers": 2}, {"use_bn": True}])
def test_of_another_head_the_backbone_s_moments_are_restored_alone(theirs: dict[str, Any]) -> None:
    run, ours = Run(**theirs).train(), dino()
    weights = read(run.state())
    load(ours, weights, backbone_only=True)
    optimizer = optimizer_of(ours)
    restored, fresh = load_optimizer(optimizer, ours.student, weights.optimizer)
    expected = moments(run.optimizer, run.networks[0])
    ours_now = moments(optimizer, ours.student)
    body = {k: v for k, v in expected.items() if k.startswith("backbone.")}
    assert_same_moments({k: v for k, v in ours_now.items() if k.startswith("backbone.")}, body)
    assert restored == len(ours_now) >= len(body)
    assert restored + fresh == sum(p.requires_grad for p in ours.student.parameters())
    for k, state in ours_now.items():
        assert state["exp_avg"].shape == ours.student.get_parameter(k).shape


def test_prototypes_that_were_frozen_all_along_start_fresh() -> None:
    run, ours = Run().train(), dino()
    state = run.state()
    del state["optimizer"]["state"][_number(run, "head.last_layer.weight_v")]
    load(ours, weights := read(state))
    optimizer = optimizer_of(ours)
    assert load_optimizer(optimizer, ours.student, weights.optimizer)[1] == 1
    assert "head.last_layer.weight_v" not in moments(optimizer, ours.student)


def _number(run: Run, name: str) -> int:
    wanted = run.networks[0].get_parameter(name)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    return next(i for i, p in enumerate(parameters) if p is wanted)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("adamw", "sgd"), ("sgd", "adamw"), ("lars", "sgd"), ("sgd", "lars"), ("adamw", "lars")],
)
def test_another_optimiser_s_moments_are_not_taken_for_its_own(theirs: str, ours: str) -> None:
    run, networks = Run(optimizer=theirs).train(), dino()
    optimizer = optimizer_of(networks, name=ours)
    restored, fresh = load_optimizer(optimizer, networks.student, read(run.state()).optimizer)
    assert (restored, fresh) == (0, sum(p.requires_grad for p in networks.student.parameters()))
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("backbone", [lambda: ViT(depth=3), lambda: ViT(depth=1), lambda: ViT(dim=48)])
def test_another_backbone_s_moments_are_not_taken_even_where_shapes_agree(backbone: Any) -> None:
    run, ours = Run(backbone=backbone).train(), dino()
    optimizer = optimizer_of(ours)
    assert load_optimizer(optimizer, ours.student, read(run.state()).optimizer)[0] == 0
    assert not any(optimizer.state.values())


def test_steps_that_old_files_count_in_plain_numbers_are_read() -> None:
    run, ours = Run().train(steps=3), dino()
    state = run.state()
    for moment in state["optimizer"]["state"].values():
        moment["step"] = int(moment["step"])
    optimizer = optimizer_of(ours)
    load_optimizer(optimizer, ours.student, read(state).optimizer)
    assert {float(m["step"]) for m in optimizer.state.values()} == {3.0}


# Writing


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"norm_last_layer": False, "optimizer": "sgd"}, {"norm_last_layer": False}),
        ({"use_bn": True, "optimizer": "lars"}, {"use_bn": True}),
        (
            {"backbone": torchvision_resnet, "use_bn": True, "optimizer": "lars"},
            {"backbone": RESNET, "use_bn": True},
        ),
    ],
    ids=["adamw", "sgd, learnt magnitude", "lars, batch norm", "resnet"],
)
def test_what_comes_in_goes_out_as_it_was(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    run, networks = Run(**theirs).train(), dino(**ours)
    load(networks, weights := read(run.state()))
    optimizer = optimizer_of(networks, name=theirs.get("optimizer", "adamw"))
    load_optimizer(optimizer, networks.student, weights.optimizer)
    data = saved(to_official(networks, optimizer, epoch=9, args={"arch": "vit_small", "lr": 0.001}))

    other = Run(**theirs).train(1)
    assert other.restart(data) == 9
    for part in ("student", "teacher", "dino_loss"):
        before, after = run.state()[part], other.state()[part]
        assert list(before) == list(after)
        for k, v in before.items():
            assert torch.equal(v, after[k]), k
    assert_same_moments(moments(other.optimizer, other.networks[0]), moments(run.optimizer, run.networks[0]))
    other.train(1)  # its groups have all that a step looks up
    body = networks.teacher.backbone
    copy = torchvision_resnet() if "backbone" in theirs else ViT()
    load_pretrained_weights(copy, data)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same(body.eval()(x), copy.eval()(x))


def test_a_written_checkpoint_says_what_the_published_one_says() -> None:
    run, ours = Run().train(), dino()
    load(ours, read(run.state()))
    state = to_official(ours, optimizer_of(ours), epoch=9, args={"arch": "vit_small"})
    assert state.keys() == run.state().keys() - {"fp16_scaler"}
    assert state["args"] == {"arch": "vit_small"}
    groups, published = (s["optimizer"]["param_groups"] for s in (state, run.state()))
    assert [g["params"] for g in groups] == [g["params"] for g in published]
    assert groups[1]["weight_decay"] == 0


def test_rates_of_their_own_become_the_published_two_groups() -> None:
    ours = dino(norm_last_layer=False)
    optimizer = optimizer_of(ours, layer_decay=0.5)
    ours.student([torch.randn(2, 3, 16, 16)]).logits.square().mean().backward()
    for group in optimizer.param_groups:
        group |= {"lr": 0.1 * group["lr_scale"], "weight_decay": 0.3 if group["decays"] else 0.0}
    optimizer.step()
    state = to_official(ours, optimizer, epoch=1, args={})
    assert [(g["lr"], g["weight_decay"]) for g in state["optimizer"]["param_groups"]] == [
        (0.1, 0.3),
        (0.1, 0.0),
    ]
    run = Run(norm_last_layer=False)
    run.restart(saved(state))
    assert_same_moments(moments(run.optimizer, run.networks[0]), moments(optimizer, ours.student))


def test_a_tiny_resnet_of_ours_survives_the_round_trip() -> None:
    theirs, ours = (dino(backbone=TINY_RESNET, use_bn=True) for _ in range(2))
    weights = read(to_official(theirs, optimizer_of(theirs), epoch=1, args={"pos_embed": "timm"}))
    load(ours, weights)
    for k, v in theirs.state_dict().items():
        assert torch.equal(v, ours.state_dict()[k])


@pytest.mark.parametrize(("pos_embed", "official"), [("timm", False), ("official", True)])
def test_an_exported_checkpoint_says_how_its_position_embeddings_are_resized(
    pos_embed: str, official: bool
) -> None:
    ours = dino(pos_embed=pos_embed)
    state = to_official(ours, optimizer_of(ours), epoch=1, args={"pos_embed": pos_embed})
    assert read(state).official is official


def test_the_head_of_this_test_is_the_head_that_ours_is() -> None:
    wrapper = MultiCropWrapper(ViT(), Head(32))
    assert wrapper.state_dict().keys() == dino().student.state_dict().keys()
