"""Published checkpoints come in, whole or in part, under the names of every publisher: the same logits."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from published import Run, ViT, saved
from published_twins import RESNET, assert_same, assert_same_networks, dino, read, torchvision_resnet
from tiny import tiny_config
from torch import Tensor, nn

from dinoray.models.published.checkpoint import fit_backbone, load, read_weights
from dinoray.models.published.fit import fit_head


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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


def test_a_head_comes_in_whatever_the_order_of_its_tensors() -> None:
    head = dino().teacher.head
    backwards = dict(reversed(head.state_dict().items()))
    assert list(fit_head(backwards, head)) == list(head.state_dict())


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
